"""The least times of every case on GPUs that are not here: predicted by work counted and ceilings assumed.

A prediction is made before a kernel is measured, so that a measured time says what is still to be explained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from softdimo_fast.benchmark.cases import Case
from softdimo_fast.benchmark.settings import Settings
from softdimo_fast.benchmark.tables import Cell, Table, number, table_markdown
from softdimo_fast.benchmark.workloads import least_work
from softdimo_fast.benchmark.workloads.common import Work

# Operators whose operations are those of matrix products, and the variant that begins with one.
PRODUCTS = ("soft_embedding", "linear_soft_embedding", "masked_attention")
HEAD = "head"
# A float32 number is three bfloat16 ones; a product of two such keeps the three largest of nine products.
FLOAT32_PRODUCTS = 3
PHASES = ("forward", "backward", "both")

INTRODUCTION = (
    "Predictions: nothing here was measured. Each time is the least that the assumed ceilings allow, in "
    "microseconds, launches not included, with what binds: memory, product (tensor cores), arithmetic "
    "(float32 outside of them) or exp. Work is counted as in the report of a measured run: every input read "
    "once, every output written once; a float32 product is three of bfloat16. On H100 and H200 products by "
    "mma.sync instead of wgmma reach about 450 TFLOP/s at best."
)


@dataclass(frozen=True)
class Chip:
    """Assumed rates, per second: what good kernels reach, not what data sheets say.

    Attributes:
        name: of the GPU.
        memory: bytes read or written.
        product: bfloat16 operations of a large product.
        arithmetic: float32 operations outside of tensor cores, two per multiply-add, at the full clock.
        exponentials: of the special function units, 16 a clock and multiprocessor.
    """

    name: str
    memory: float
    product: float
    arithmetic: float
    exponentials: float

    def floor(self, work: Work, case: Case) -> tuple[float, str]:
        """The least seconds, and what binds."""
        times = {
            "memory": (work.read + work.written) / self.memory,
            "exp": work.exponentials / self.exponentials,
        }
        if case.operator in PRODUCTS or case.variant == HEAD:
            terms = FLOAT32_PRODUCTS if case.dtype == "float32" else 1
            times["product"] = terms * work.flops / self.product
        else:
            times["arithmetic"] = work.flops / self.arithmetic
        bound = max(times, key=lambda what: times[what])
        return times[bound], bound


CHIPS = (
    Chip("A100", 1.80e12, 270e12, 19.5e12, 2.44e12),
    Chip("H100", 3.00e12, 700e12, 61.8e12, 3.87e12),
    Chip("H200", 4.30e12, 780e12, 61.8e12, 3.87e12),
)


def predict(chosen: Settings) -> str:
    """The tables of every selected case with the sizes of a GPU, as Markdown. Needs no GPU.

    Raises:
        BenchmarkError: a filter names something unknown, or nothing is left.
    """
    chosen.check()
    cases = chosen.selected()
    tables = [table_markdown(_ceilings())]
    for operator in dict.fromkeys(case.operator for case in cases):
        mine = [case for case in cases if case.operator == operator]
        tables.append(table_markdown(_table(operator, mine, chosen.phases or PHASES)))
    return "\n\n".join(["# softdimo_fast, predicted", INTRODUCTION, *tables])


def _ceilings() -> Table:
    headings = [
        ("assumed", False),
        *((text, True) for text in ("memory, TB/s", "product, TFLOP/s", "arithmetic, TFLOP/s", "exp, T/s")),
    ]  # fmt: skip
    rows = [
        [
            Cell(chip.name),
            *(
                Cell(number(rate / 1e12), "num")
                for rate in (chip.memory, chip.product, chip.arithmetic, chip.exponentials)
            ),
        ]
        for chip in CHIPS
    ]
    return Table("Ceilings, assumed", headings, [rows])


def _table(operator: str, cases: Sequence[Case], phases: Sequence[str]) -> Table:
    headings = [
        *((text, False) for text in ("case", "dtype", "phase")),
        *((text, True) for text in ("MB", "GFLOP", "G exp", *(f"{chip.name}, us" for chip in CHIPS))),
    ]  # fmt: skip
    rows = []
    for case in cases:
        work = least_work(case, "cuda")
        rows += [
            [Cell(case.title("cuda")), Cell(case.dtype), Cell(phase), *_cells(work[phase], case)]
            for phase in phases
            if phase in work
        ]
    return Table(f"{operator}, predicted least times", headings, [rows])


def _cells(work: Work, case: Case) -> list[Cell]:
    counted = ((work.read + work.written) / 1e6, work.flops / 1e9, work.exponentials / 1e9)
    cells = [Cell(number(value), "num") for value in counted]
    for chip in CHIPS:
        seconds, bound = chip.floor(work, case)
        cells.append(Cell(f"{number(seconds * 1e6)} {bound}", "num"))
    return cells
