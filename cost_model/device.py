"""One device: what its file says of it, and the seconds an op takes there.

Ops come in kinds, and a device has one row for each kind. Kinds in ``GEMM_KINDS`` are priced by their arithmetic
(`GemmRow`), the others by the bytes they move (`StreamRow`). Bytes count every input read once and every output
written once; a multiply-add counts as two operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cost_model.cold_calls import ColdCalls
from cost_model.device_rows import ATTENTION_PRODUCTS, GemmRow, Row, StreamRow, Tiling, is_small_product
from cost_model.errors import UnknownNameError, UnsupportedError
from cost_model.hardware_file import Table, read_shipped, shipped_names
from cost_model.program import OpCost
from cost_model.tensor import COMPLEX, DTYPE_BYTES, FLOATING

GEMM_KINDS = ("matmul", "batched_matmul", "convolution", "convolution_backward", "attention", "attention_backward")
_PRICED_LIKE = {"batched_matmul": "matmul", "convolution_backward": "convolution", "convolution": "matmul"}
"""Kinds that a device's file may leave out."""
STREAM_KINDS = (
    "elementwise",
    "transcendental",
    "softmax",
    "softmax_backward",
    "norm",
    "norm_backward",
    "reduction",
    "gather",
    "scatter",
    "copy",
    "random",
    "loss",
    "loss_backward",
    "optimizer",
    "other",
)
KINDS = GEMM_KINDS + STREAM_KINDS
DEVICE_KINDS = ("cuda", "cpu")
_STEP = ("step", "update")
_COLD = ("cold_op", "cold_view", "cold_product", "cold_overhead")
BLAS, ONEDNN = PRODUCT_LIBRARIES = ("blas", "onednn")


@dataclass(frozen=True)
class Device:
    """A device as its file describes it; everything in SI units.

    kind: "cuda" or "cpu". memory_bytes: what a program may be given; reserve_bytes: what the runtime around it
    takes (context, communication library, interpreter). peak_flops: by dtype; a dtype that is missing is one the
    device cannot compute in. op_overhead_s: the least time between the starts of two small ops; kernel_overhead_s: of
    two kernels that a compiler made. cold_calls: what a call takes longer whose code has left the caches, if measured.
    step_overhead_s, update_overhead_s: of a step beside blocks, messages and the optimizer's kernels, and of each
    tensor that it updates, as far as measured.
    rows: one per kind of ``KINDS``. ops: rows of single ops that were measured, by name in the op table; they come
    before that of their kind. products: of ``PRODUCT_LIBRARIES``, what multiplies matrices of float32 on a CPU: what
    torch itself calls, or oneDNN, which uses AVX-512 also where that does not; small ones go to the former even so, as
    batches do, and by its row. reported_as: names under which
    torch.cuda reports it. sources: by table. path: of the file.
    """

    name: str
    kind: str
    memory_bytes: int
    reserve_bytes: int
    memory_bandwidth_bytes_per_s: float
    peak_flops: Mapping[str, float] = field(hash=False)
    op_overhead_s: float
    kernel_overhead_s: float
    rows: Mapping[str, Row] = field(hash=False)
    ops: Mapping[str, StreamRow] = field(default_factory=dict, hash=False)
    products: str = BLAS
    step_overhead_s: float = 0.0
    update_overhead_s: float = 0.0
    cold_calls: ColdCalls | None = None
    reported_as: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)
    path: str = field(default="its file", compare=False)

    def __post_init__(self) -> None:
        assert self.kind in DEVICE_KINDS and set(self.rows) == set(KINDS)
        assert 0 <= self.reserve_bytes < self.memory_bytes

    @classmethod
    def load(cls, name: str) -> Device:
        """The shipped device of this name. Errors: UnknownNameError, ClusterFileError."""
        return device_from_table(read_shipped("devices", "device", name))

    @property
    def usable_bytes(self) -> int:
        return self.memory_bytes - self.reserve_bytes

    def op_time_s(self, cost: OpCost) -> float:
        """Seconds of one call of this cost. Errors: UnknownNameError (kind), UnsupportedError (dtype)."""
        if cost.parts:
            return self._kernel_s(cost)
        row = self._row(cost)
        if isinstance(row, StreamRow):
            return row.seconds(cost.nbytes, cost.rows)
        return row.seconds(cost, self.peak(cost.dtype), self.memory_bandwidth_bytes_per_s)

    def call_overhead_s(self, cost: OpCost) -> float:
        """The part of that which a call takes whatever its tensors' size. Errors: UnknownNameError (kind)."""
        if cost.parts:
            return self.kernel_overhead_s
        row = self._row(cost)
        return row.overhead_s + (row.per_matrix_s if isinstance(row, GemmRow) else 0.0)

    def step_s(self, tensors: int) -> float:
        """Seconds of a step that updates so many tensors, beside its ops and messages."""
        return self.step_overhead_s + tensors * self.update_overhead_s

    def _row(self, cost: OpCost) -> Row:
        """Of its op, or of its kind."""
        row = self.rows.get(cost.kind)
        if row is None:
            raise UnknownNameError("op kind", cost.kind, self.rows)
        if self.products == ONEDNN and is_small_product(cost):
            row = self.rows["batched_matmul"]
        return self.ops.get(cost.op, row) if cost.op else row

    def _kernel_s(self, cost: OpCost) -> float:
        """Seconds of a kernel compiled from several ops: its bytes move once, as fast as an elementwise op moves them;
        what each op takes beyond moving its own bytes, for arithmetic, remains."""
        return self.kernel_overhead_s + self._moving_s(cost.nbytes) + sum(map(self._arithmetic_s, cost.parts))

    def _moving_s(self, nbytes: float) -> float:
        row = self.rows["elementwise"]
        assert isinstance(row, StreamRow)
        return row.moving_s(nbytes)

    def _arithmetic_s(self, cost: OpCost) -> float:
        row = self.rows[cost.kind]
        row = self.ops.get(cost.op, row) if cost.op else row
        assert isinstance(row, StreamRow)
        return max(0.0, row.moving_s(cost.nbytes, cost.rows) - self._moving_s(cost.nbytes))

    @property
    def slowing(self) -> float:
        """How much longer a byte may take in a larger op than in a smaller one, at most; 1 where it never does."""
        rows = [row for row in (*self.rows.values(), *self.ops.values()) if isinstance(row, StreamRow)]
        return max(row.slowing for row in rows)

    def product_s(self, dtype: str | None = None) -> float:
        """Seconds of one large product in a dtype, or in the fastest: to compare devices by."""
        dtype = dtype or max(self.peak_flops, key=lambda name: (self.peak_flops[name], name))
        return self.op_time_s(OpCost("matmul", 2.0 * 4096**3, 6.0 * 4096**2, dtype, (1, 4096, 4096, 4096)))

    def peak(self, dtype: str) -> float:
        """Operations per second in this dtype, complex numbers' in that of their parts. Errors: UnsupportedError."""
        dtype = COMPLEX.get(dtype, dtype)
        if dtype not in self.peak_flops:
            have = ", ".join(sorted(self.peak_flops))
            raise UnsupportedError(
                f"device {self.name} has no {dtype} arithmetic: {self.path} has no key peak.{dtype}, but {have}. "
                "Next: choose one of these as the compute precision, or add the rate to the file"
            )
        return self.peak_flops[dtype]

    def with_memory(self, memory_bytes: int) -> Device:
        """The same device with this much memory."""
        return replace(self, memory_bytes=memory_bytes)


def device_names() -> tuple[str, ...]:
    """Names of the shipped devices, sorted."""
    return shipped_names("devices")


def attention_cost(
    batch: int, queries: int, keys: int, depth: int, *, causal: bool, backward: bool, nbytes: float, dtype: str
) -> OpCost:
    """Cost of fused attention over ``batch`` (samples x heads); flops count only the scores a causal mask keeps."""
    kind = "attention_backward" if backward else "attention"
    kept = sum(min(keys, row + 1) for row in range(queries)) if causal else queries * keys
    flops = 2.0 * ATTENTION_PRODUCTS[kind] * batch * kept * depth
    return OpCost(kind, flops, nbytes, dtype, (batch, queries, keys, depth))


def device_from_table(table: Table) -> Device:
    """A device from its TOML table. Errors: ClusterFileError for unknown, missing and impossible figures."""
    table.only(
        ("schema", "name", "kind", "products", "reported_as", "source", "memory", "peak", "overhead", "cost", "op")
    )
    kind = table.text("kind")
    if kind not in DEVICE_KINDS:
        table.fail("kind", f"must be one of {', '.join(DEVICE_KINDS)}, not {kind!r}")
    products = table.text("products") if "products" in table.raw else BLAS
    if products not in PRODUCT_LIBRARIES:
        table.fail("products", f"must be one of {', '.join(PRODUCT_LIBRARIES)}, not {products!r}")
    sources = {"device": table.text("source")}
    memory = _sourced(table, "memory", ("capacity", "reserve", "bandwidth"), sources)
    overhead = _sourced(table, "overhead", ("op", "kernel", *_STEP, *_COLD), sources)
    peak = _sourced(table, "peak", DTYPE_BYTES, sources)
    bandwidth, op_overhead_s = memory.bandwidth("bandwidth"), overhead.seconds("op")
    if memory.nbytes("reserve") >= memory.nbytes("capacity"):
        memory.fail("reserve", "must be below the capacity")
    return Device(
        name=table.text("name"),
        kind=kind,
        memory_bytes=memory.nbytes("capacity"),
        reserve_bytes=memory.nbytes("reserve"),
        memory_bandwidth_bytes_per_s=bandwidth,
        peak_flops=_peaks(peak),
        op_overhead_s=op_overhead_s,
        kernel_overhead_s=overhead.seconds("kernel") if overhead.has("kernel") else op_overhead_s,
        rows=_rows(table.table("cost"), bandwidth, op_overhead_s, sources),
        ops=_ops(table.table("op"), bandwidth, op_overhead_s, sources) if table.has("op") else {},
        products=products,
        step_overhead_s=overhead.seconds("step") if overhead.has("step") else 0.0,
        update_overhead_s=overhead.seconds("update") if overhead.has("update") else 0.0,
        cold_calls=_cold_calls(overhead),
        reported_as=table.texts("reported_as") if table.has("reported_as") else (),
        sources=sources,
        path=table.path,
    )


def device_of(table: Table) -> Device:
    """The device that a table names under "device", or holds there as a table of its own. Errors: ClusterFileError."""
    if isinstance(table.value("device"), dict):
        return device_from_table(table.table("device"))
    name = table.text("device")
    try:
        return Device.load(name)
    except UnknownNameError as error:
        table.fail("device", f"unknown device {name!r}", error.nearest)


def _sourced(table: Table, name: str, known: Mapping[str, int] | tuple[str, ...], sources: dict[str, str]) -> Table:
    """A sub-table that holds these keys and must say where its figures come from."""
    part = table.table(name)
    part.only((*known, "source"))
    sources[part.key.removeprefix("device.")] = part.text("source")
    return part


def _cold_calls(overhead: Table) -> ColdCalls | None:
    """All figures or none."""
    if not any(map(overhead.has, _COLD)):
        return None
    op, view, product, own = _COLD
    return ColdCalls(overhead.points(op), overhead.points(view), overhead.points(product), overhead.seconds(own))


def _peaks(table: Table) -> dict[str, float]:
    peaks = {dtype: table.rate(dtype) for dtype in table.raw if dtype in FLOATING}
    if not peaks:
        table.fail("float32", "missing; give the rate of at least one floating dtype")
    return peaks


def _rows(table: Table, bandwidth: float, op_overhead_s: float, sources: dict[str, str]) -> dict[str, Row]:
    table.only(KINDS)
    rows: dict[str, Row] = {}
    for kind in GEMM_KINDS:
        like = kind
        while like not in table.raw and like in _PRICED_LIKE:
            like = _PRICED_LIKE[like]
        rows[kind] = _gemm_row(table, like, op_overhead_s, sources)
    for kind in STREAM_KINDS:
        rows[kind] = _stream_row(table, kind, bandwidth, op_overhead_s, sources)
    return rows


def _ops(table: Table, bandwidth: float, op_overhead_s: float, sources: dict[str, str]) -> dict[str, StreamRow]:
    return {name: _stream_row(table, name, bandwidth, op_overhead_s, sources) for name in table.raw}


def _gemm_row(table: Table, kind: str, op_overhead_s: float, sources: dict[str, str]) -> GemmRow:
    """Either smooth (half_m, half_n, half_outputs) or tiled (units, tiles, half_tile)."""
    smooth, tiled = ("half_m", "half_n", "half_outputs"), ("units", "tiles", "half_tile")
    masked = ("mask_block",) if kind in ATTENTION_PRODUCTS else ()
    figures = ("efficiency", "dtype_efficiency", "half_k", *smooth, *tiled, *masked, "per_matrix", "overhead")
    row = _sourced(table, kind, figures, sources)
    is_tiled = row.has("tiles")
    for name in smooth if is_tiled else tiled:
        if row.has(name):
            row.fail(name, f"give either {', '.join(smooth)} or {', '.join(tiled)}, not parts of both")
    half_m, half_n, half_outputs = (0.0 if is_tiled else row.number(name) for name in smooth)
    return GemmRow(
        efficiency=_fraction(row),
        half_m=half_m,
        half_n=half_n,
        half_k=row.number("half_k"),
        half_outputs=half_outputs,
        per_matrix_s=row.seconds("per_matrix") if row.has("per_matrix") else 0.0,
        overhead_s=row.seconds("overhead") if row.has("overhead") else op_overhead_s,
        mask_block=row.number("mask_block") if masked else 0.0,
        tiling=_tiling(row) if is_tiled else None,
        dtype_efficiency=_dtype_efficiency(row.table("dtype_efficiency")) if row.has("dtype_efficiency") else {},
    )


def _dtype_efficiency(table: Table) -> dict[str, float]:
    table.only(sorted(FLOATING))
    return {dtype: _fraction(table, dtype) for dtype in table.raw}


def _tiling(row: Table) -> Tiling:
    shapes = row.value("tiles")
    good = isinstance(shapes, list) and shapes and all(_is_tile(shape) for shape in shapes)
    if not good:
        row.fail("tiles", "must be pairs of whole numbers above zero, as [[256, 128], [128, 128]]")
    return Tiling(row.count("units"), tuple((a, b) for a, b in shapes), row.number("half_tile"))  # type: ignore[attr-defined]


def _is_tile(shape: object) -> bool:
    sides = shape if isinstance(shape, list) else ()
    return len(sides) == 2 and all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)


def _stream_row(table: Table, kind: str, bandwidth: float, op_overhead_s: float, sources: dict[str, str]) -> StreamRow:
    """A measured curve, or a share of the memory bandwidth at every size."""
    row = _sourced(table, kind, ("efficiency", "curve", "overhead", "per_row"), sources)
    if row.has("efficiency") and row.has("curve"):
        row.fail("curve", "give either efficiency or curve, not both")
    points = row.points("curve") if row.has("curve") else ((1.0, bandwidth * _fraction(row)),)
    overhead_s = row.seconds("overhead") if row.has("overhead") else op_overhead_s
    return StreamRow(points, overhead_s, row.seconds("per_row") if row.has("per_row") else 0.0)


def _fraction(row: Table, name: str = "efficiency") -> float:
    value = row.number(name)
    if not 0 < value <= 1:
        row.fail(name, f"must be above 0 and at most 1, not {value!r}")
    return value
