"""Where it runs: accelerators, nodes, fabrics, and the topology graph."""

from simllm.hardware.accelerator import Accelerator, load_accelerator
from simllm.hardware.cluster import Cluster, load_cluster, make_cluster
from simllm.hardware.fabric import load_fabric
from simllm.hardware.figures import Figure
from simllm.hardware.links import load_link
from simllm.hardware.profiles import check_profile, list_profiles, register_kind
from simllm.hardware.stack import load_stack
from simllm.hardware.topology import build_topology

__all__ = [
    "Accelerator",
    "Cluster",
    "Figure",
    "build_topology",
    "check_profile",
    "list_profiles",
    "load_accelerator",
    "load_cluster",
    "load_fabric",
    "load_link",
    "load_stack",
    "make_cluster",
    "register_kind",
]
