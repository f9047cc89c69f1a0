"""What one operator costs on one accelerator."""

from simllm.kernels.device import Kernels
from simllm.kernels.matmul import MatmulTime
from simllm.kernels.profile import KernelProfile, known_kernel_profiles, load_kernel_profile

__all__ = ["KernelProfile", "Kernels", "MatmulTime", "known_kernel_profiles", "load_kernel_profile"]
