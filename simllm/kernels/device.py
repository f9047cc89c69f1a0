"""Kernels of one accelerator: every operator's time in seconds, cached, as plain floats."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

from simllm.errors import InputError, unknown_name
from simllm.hardware.accelerator import Accelerator
from simllm.kernels.attention import AttentionModel, flash_attention_time, unfused_attention_time
from simllm.kernels.matmul import MatmulModel, MatmulTime, even_groups, matmul_parts
from simllm.kernels.memory import memory_bound_time
from simllm.kernels.profile import KernelProfile, load_form, load_kernel_profile, own_kernel_profile
from simllm.kernels.schema import AttentionEntry, FormFile, MatmulEntry

__all__ = ["Kernels", "bind_attention", "bind_matmul"]

# Distinct operator shapes of a large plan search; an entry is about 200 bytes.
_CACHE = 1 << 16


class Kernels:
    """What operators cost on one accelerator.

    Parameters
    ----------
    accelerator : Accelerator
        The device: peaks, bandwidth, compute units.
    profile : KernelProfile, optional
        How close kernels come to the peaks; the shipped profile of the device's name if left out.
    burst : bool
        True prices a short benchmark; False (default) a long run, whose matmul rate is lower by the profile's sustained
        fraction because clocks fall at the power limit.

    Examples
    --------
    >>> from simllm.hardware.accelerator import load_accelerator
    >>> h100 = Kernels(load_accelerator("h100-sxm"), burst=True)
    >>> flops = 2 * 8192**3
    >>> 0.70 < flops / h100.matmul(8192, 8192, 8192, "bf16") / 989.4e12 < 0.85
    True
    >>> h100.matmul(0, 8192, 8192, "bf16")
    0.0
    """

    def __init__(self, accelerator: Accelerator, *, profile: KernelProfile | None = None, burst: bool = False) -> None:
        self.accelerator = accelerator
        self.profile = profile or _profile_of(accelerator)
        self.burst = burst
        self._form = load_form()
        self._matmul_models: dict[str, MatmulModel] = {}
        self._assumed: dict[str, str] = {}
        self._matmul_parts = lru_cache(maxsize=_CACHE)(self._price_matmul)
        self._matmul = lru_cache(maxsize=_CACHE)(
            lambda m, n, k, precision, count, quantise: (
                self._matmul_parts(((count, m),), n, k, precision, quantise).total_s
            )
        )
        self._grouped = lru_cache(maxsize=_CACHE)(self._price_grouped)
        self._attention = lru_cache(maxsize=_CACHE)(self._price_attention)

    @property
    def launch_s(self) -> float:
        """Shortest time of a small kernel, seconds."""
        return self.profile.launch_s

    @property
    def precisions(self) -> tuple[str, ...]:
        """Matmul precisions this device has a rate for."""
        return tuple(name for name, entry in self._form.precisions.items() if entry.peak in self.accelerator.peak_flops)

    @property
    def attention_implementations(self) -> tuple[str, ...]:
        """What `attention` accepts as implementation on this device."""
        return (*self.profile.attention, "unfused")

    @property
    def default_attention(self) -> str:
        """The implementation a current framework picks on this device."""
        return self.profile.default_attention

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What stands in for a measurement in everything priced so far."""
        return (*self.profile.assumptions, *self._assumed.values())

    def matmul(self, m: int, n: int, k: int, precision: str, count: int = 1, quantise: str | None = None) -> float:
        """Seconds for ``count`` matmuls of ``m x k`` by ``k x n`` in one batched kernel.

        Parameters
        ----------
        m, n, k : int
            Rows and columns of the result, length of the dot products; 0 costs nothing.
        precision : str
            One of `precisions`: bf16, fp16, fp32, tf32, fp8, mxfp8, nvfp4.
        count : int
            Matmuls in the batch.
        quantise : {"cast", "dynamic", "none"}, optional
            For fp8, mxfp8 and nvfp4, how the left operand gets its precision: by one fused kernel (the default, as
            training frameworks do), by separate kernels for maximum and cast (as the libraries behind the tables of
            measurements do), or already has it.
        """
        seconds: float = self._matmul(m, n, k, precision, count, quantise)
        return seconds

    def matmul_parts(
        self, m: int, n: int, k: int, precision: str, count: int = 1, quantise: str | None = None
    ) -> MatmulTime:
        """The same with its parts by name: kernel, launch, quantisation."""
        return self._matmul_parts(((count, m),), n, k, precision, quantise)

    def grouped_matmul(
        self, tokens: int | tuple[int, ...], n: int, k: int, groups: int, precision: str, quantise: str | None = None
    ) -> float:
        """Seconds for the matmuls of several experts in one grouped kernel, each with its own ``k x n`` weight.

        Parameters
        ----------
        tokens : int or tuple of int
            Tokens of all groups together, spread evenly; or the tokens of each group.
        n, k : int
            Output and input size of an expert.
        groups : int
            Experts on this device.
        precision, quantise
            As in `matmul`.
        """
        seconds: float = self._grouped(tokens, n, k, groups, precision, quantise)
        return seconds

    def attention(
        self,
        batch: int,
        heads: int,
        kv_heads: int,
        seq_q: int,
        seq_k: int,
        head_dim: int,
        v_head_dim: int | None = None,
        work_fraction: float = 1.0,
        implementation: str | None = None,
        direction: str = "forward",
        precision: str = "bf16",
        score_bytes: float | None = None,
    ) -> float:
        """Seconds of scaled-dot-product attention, without the projections.

        Parameters
        ----------
        batch, heads, kv_heads : int
            Sequences, query heads and key-value heads on this device.
        seq_q, seq_k : int
            Queries and keys of each sequence.
        head_dim, v_head_dim : int
            Size of a query head and of a value head (the same if left out).
        work_fraction : float
            Share of the ``seq_q x seq_k`` square that the mask keeps: 1 full, 0.5 causal. Unfused attention computes
            the whole square whatever the mask.
        implementation : str, optional
            One of `attention_implementations`; `default_attention` if left out.
        direction : {"forward", "backward"}
            Backward includes the recomputation of the scores that fused kernels do.
        precision : str
            bf16 or fp16, or what the device's entry names; unfused attention also fp32 and tf32.
        score_bytes : float, optional
            Unfused only: bytes moved per score beside the matmuls; those of a fused softmax and dropout if left out.
        """
        seconds: float = self._attention(
            batch,
            heads,
            kv_heads,
            seq_q,
            seq_k,
            head_dim,
            head_dim if v_head_dim is None else v_head_dim,
            work_fraction,
            implementation or self.profile.default_attention,
            direction,
            precision,
            score_bytes,
        )
        return seconds

    def memory_bound(self, size_bytes: float, kind: str = "") -> float:
        """Seconds of one kernel that reads and writes ``size_bytes`` in all and computes next to nothing.

        Parameters
        ----------
        size_bytes : float
            Bytes read plus bytes written.
        kind : str
            What the kernel does and in which direction (``norm forward``, ``optimizer``), for devices whose profile
            tells kinds apart.
        """
        profile = self.profile
        efficiency = profile.stream_efficiency.get(kind, profile.memory_efficiency)
        return memory_bound_time(size_bytes, self.accelerator.memory_bandwidth, efficiency, profile.launch_s)

    def attention_precisions(self, implementation: str) -> tuple[str, ...]:
        """The precisions that an implementation of `attention` runs in."""
        entries = self.profile.attention.get(implementation)
        entry = (entries.forward or entries.backward) if entries else None
        return entry.precisions if entry else self.precisions

    def _price_matmul(
        self, rows: tuple[tuple[int, int], ...], n: int, k: int, precision: str, quantise: str | None
    ) -> MatmulTime:
        model = self._matmul_models.get(precision) or self._bind(precision)
        if model.cast_bytes == 0.0:
            if quantise not in (None, "none"):
                raise InputError(f"quantise={quantise!r}: {precision} matmuls quantise nothing; leave it out")
            quantise = "none"
        return matmul_parts(model, rows, n, k, quantise or "cast")

    def _price_grouped(
        self, tokens: int | tuple[int, ...], n: int, k: int, groups: int, precision: str, quantise: str | None
    ) -> float:
        if groups <= 0:
            return 0.0
        if isinstance(tokens, tuple):
            if len(tokens) != groups:
                raise InputError(f"tokens has {len(tokens)} entries for groups={groups}; give one for each group")
            rows = tuple((1, size) for size in tokens)
        else:
            rows = even_groups(tokens, groups)
        return self._matmul_parts(rows, n, k, precision, quantise).total_s

    def _price_attention(
        self,
        batch: int,
        heads: int,
        kv_heads: int,
        seq_q: int,
        seq_k: int,
        head_dim: int,
        v_head_dim: int,
        work_fraction: float,
        implementation: str,
        direction: str,
        precision: str,
        score_bytes: float | None,
    ) -> float:
        if direction not in ("forward", "backward"):
            raise unknown_name("direction", direction, ("forward", "backward"))
        if not 0.0 <= work_fraction <= 1.0:
            raise InputError(f"work_fraction={work_fraction} must lie between 0 and 1 (causal 0.5, full 1)")
        backward = direction == "backward"
        if implementation == "unfused":
            form = self._form.unfused
            if score_bytes is None:
                score_bytes = (form.score_bytes_backward if backward else form.score_bytes_forward).si("bytes")
            model = self._matmul_models.get(precision) or self._bind(precision)
            bandwidth, efficiency = self.accelerator.memory_bandwidth, self.profile.memory_efficiency
            return unfused_attention_time(
                model,
                batch,
                heads,
                seq_q,
                seq_k,
                head_dim,
                v_head_dim,
                score_bytes,
                bandwidth,
                efficiency,
                backward,
            )
        if score_bytes is not None:
            raise InputError(f"score_bytes={score_bytes}: {implementation} keeps the scores on chip; leave it out")
        entries = self.profile.attention.get(implementation)
        if entries is None:
            raise unknown_name(f"attention on {self.accelerator.name}", implementation, self.attention_implementations)
        entry = entries.backward if backward else entries.forward
        if entry is None:
            raise InputError(
                f"direction={direction}: {implementation} is for inference and has none; "
                f"use {', '.join(name for name in self.attention_implementations if name != implementation)}"
            )
        if precision not in entry.precisions:
            raise InputError(
                f"precision={precision}: {implementation} attention runs in {' or '.join(entry.precisions)}"
            )
        return flash_attention_time(
            bind_attention(
                self.accelerator,
                entry,
                self._form,
                backward,
                self.profile.memory_efficiency,
                precision,
                # The matrix units that attention keeps busy run at the clock of any other long matmul.
                self._sustained(precision),
            ),
            batch,
            heads,
            kv_heads,
            seq_q,
            seq_k,
            head_dim,
            v_head_dim,
            work_fraction,
        )

    def matmul_entry(self, precision: str) -> MatmulEntry:
        """The curve that prices matmuls of a precision: its own, or the one that stands in."""
        return self.profile.matmul[self._curve(precision)]

    def _curve(self, precision: str) -> str:
        form = self._form.precisions
        if precision not in form:
            raise unknown_name("precision", precision, form)
        if form[precision].peak not in self.accelerator.peak_flops:
            raise InputError(
                f"precision={precision}: {self.accelerator.name} has no {form[precision].peak} rate; "
                f"it has {', '.join(self.precisions)}"
            )
        curve = next((name for name in form[precision].curves if name in self.profile.matmul), None)
        if curve is None:
            raise InputError(
                f"kernel profile {self.profile.files[0]} has no matmul curve for {precision}; "
                f"it has {', '.join(self.profile.matmul)}"
            )
        return curve

    def _bind(self, precision: str) -> MatmulModel:
        form = self._form.precisions
        curve = self._curve(precision)
        if curve != precision and form[curve].peak != form[precision].peak:
            self._assumed[precision] = f"{precision} matmuls on {self.accelerator.name} reach the fractions of {curve}"
        entry = self.profile.matmul[curve]
        model = bind_matmul(self.accelerator, entry, self._form, precision, self._sustained(precision))
        self._matmul_models[precision] = model
        return model

    def _sustained(self, precision: str) -> float:
        """The share of a short benchmark's rate that a long run keeps: clocks fall at the power limit."""
        if self.burst:
            return 1.0
        shares = {**self.profile.sustained, **dict(self.accelerator.sustained)}
        return next((shares[name] for name in self._form.precisions[precision].curves if name in shares), 1.0)


def _profile_of(accelerator: Accelerator) -> KernelProfile:
    """The file that the accelerator names for itself, or the catalog's."""
    if accelerator.kernels is not None:
        return own_kernel_profile(accelerator.name, accelerator.kernels)
    return load_kernel_profile(accelerator.name, accelerator.vendor)


def bind_matmul(
    accelerator: Accelerator, entry: MatmulEntry, form: FormFile, precision: str, sustained: float = 1.0
) -> MatmulModel:
    """A matmul curve and a device as plain SI numbers."""
    shape, bytes_of = form.matmul, form.precisions[precision]
    return MatmulModel(
        peak=accelerator.peak_flops[bytes_of.peak] * sustained,
        bandwidth=accelerator.memory_bandwidth,
        units=accelerator.compute_units or 1,
        rate=entry.rate.si("fraction"),
        wave=entry.wave.si("fraction"),
        overhead_k=entry.overhead_k.si("count"),
        memory=entry.memory.si("fraction"),
        droop=entry.droop.si("fraction"),
        launch_s=entry.launch.si("time"),
        element_bytes=bytes_of.element.si("bytes"),
        output_bytes=bytes_of.output.si("bytes"),
        dynamic_bytes=entry.quantise_bytes.si("bytes") if entry.quantise_bytes else 0.0,
        dynamic_launch_s=entry.quantise_launch.si("time") if entry.quantise_launch else 0.0,
        cast_bytes=bytes_of.cast.si("bytes") if bytes_of.cast else 0.0,
        tiles=tuple(shape.tiles),
        splits=tuple(shape.splits),
        split_bytes=shape.split_traffic.si("bytes"),
        join=shape.join_exponent,
        droop_start=shape.droop_start.si("count"),
        droop_decades=shape.droop_decades,
    )


def bind_attention(
    accelerator: Accelerator,
    entry: AttentionEntry,
    form: FormFile,
    backward: bool,
    efficiency: float,
    precision: str,
    sustained: float = 1.0,
) -> AttentionModel:
    """A fused attention entry and a device as plain SI numbers."""
    peaks = accelerator.peak_flops
    # Both 16-bit formats run at one rate; a device may print only one of them.
    peak = peaks.get(precision) or (peaks.get("fp16") or peaks.get("bf16") if precision in ("bf16", "fp16") else None)
    if peak is None:
        raise InputError(
            f"{accelerator.name} has no {precision} rate, which fused attention needs; it has {', '.join(peaks)}"
        )
    shape = form.attention
    sizes = sorted(entry.rate)
    return AttentionModel(
        peak=peak * sustained,
        bandwidth=accelerator.memory_bandwidth,
        efficiency=efficiency,
        units=accelerator.compute_units or 1,
        costs=tuple(zip(map(float, sizes), accumulate((s / entry.rate[s] for s in sizes), max), strict=True)),
        overhead_tokens=entry.overhead_tokens.si("count"),
        tail_tiles=entry.tail_tiles.si("count"),
        masked=entry.masked.si("fraction"),
        tile_rows=round(entry.tile_rows.si("count")),
        launch_s=entry.launch.si("time"),
        element_bytes=form.precisions[precision].element.si("bytes"),
        join=shape.join_exponent,
        work=shape.backward_work if backward else 1.0,
        backward=backward,
        padding=tuple(shape.head_dim_padding),
    )
