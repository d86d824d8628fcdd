"""``softdimo doctor``: what works on this machine, why the rest does not, and what to do about it.

Nothing but the standard library is imported at module level: the report is needed most where torch or the
compiled library is missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json as json_format
import os
import platform
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from softdimo_fast._version import __version__

# How an operator words the lack of a kernel, told from kernels that do not take a call.
NO_KERNEL = "this operator has no "
PACKAGE = Path(__file__).resolve().parent.parent

# Every variable that is read, and by what; a SOFTDIMO_ name that is not here is probably a typing error.
VARIABLES = {
    "SOFTDIMO_BACKEND": "the backend to prefer where an operator has it",
    "SOFTDIMO_CPU_ISA": "the instruction set of the C++ kernels",
    "SOFTDIMO_DEBUG": "1 checks values inside CUDA tensors too, and waits for the device to do so",
    "SOFTDIMO_LIBRARY_DIR": "the folder of _cpu.so and _cuda.so",
    "SOFTDIMO_CMAKE_ARGS": "extra CMake arguments, read when the package is built",
    "SOFTDIMO_EMULATION_SANITIZE": "1 builds the emulated CUDA kernels with sanitizers, read by the tests",
    "SOFTDIMO_HYPOTHESIS": "the hypothesis profile, read by the tests",
    "SOFTDIMO_REQUIRE_BROWSER": "1 makes the tests fail where they find no browser, instead of skipping",
}


@dataclass(frozen=True)
class Package:
    """Another Python package: what to install, what to import, what for."""

    requirement: str
    module: str
    purpose: str

    @property
    def name(self) -> str:
        return self.requirement.split(">")[0]


REQUIRED = (
    Package("torch>=2.11", "torch", "tensors"),
    Package("numpy>=1.26", "numpy", "arrays"),
    Package("einops>=0.8", "einops", "models"),
    Package("safetensors>=0.5", "safetensors", "checkpoint files"),
    Package("tyro>=0.9", "tyro", "this command line"),
    Package("tqdm>=4.66", "tqdm", "progress bars"),
)
OPTIONAL = (
    Package("triton>=3.6", "triton", "backend='triton'"),
    Package("matplotlib>=3.8", "matplotlib", "figures in reports"),
    Package("scikit-learn>=1.5", "sklearn", "the digits data set of the demo"),
    Package("pillow>=10.1", "PIL", "reading and writing images"),
    Package("torchmetrics>=1.4", "torchmetrics", "image metrics"),
    Package("torch-fidelity>=0.3", "torch_fidelity", "FID and its relatives"),
    Package("scipy>=1.11", "scipy", "matrix square roots in metrics"),
    Package("transformers>=4.45", "transformers", "text encoders and reward models"),
    Package("open_clip_torch>=2.29", "open_clip", "the HPS v2 reward, and text encoders"),
    Package("huggingface_hub>=0.30", "huggingface_hub", "published checkpoints"),
    Package("webdataset>=0.2", "webdataset", "sharded data sets"),
    Package("tensorboard>=2.16", "tensorboard", "logging"),
    Package("wandb>=0.18", "wandb", "logging"),
    Package("pytest-benchmark>=5", "pytest_benchmark", "benchmarks"),
    Package("nvidia-ml-py>=12", "pynvml", "driver version and device clocks"),
)
APEX_COMMAND = (
    "build it from NVIDIA's own repository, NVIDIA/apex (the 'apex' of PyPI is another project)"
)


@dataclass
class Operator:
    """One operator on one device: what runs by default, and for each backend why not (None: it can)."""

    name: str
    device: str
    dtype: str
    chosen: str
    kernel: str
    obstacles: dict[str, str | None]


@dataclass
class Report:
    """Everything the doctor found; ``--json`` prints these fields."""

    version: str = __version__
    folder: str = str(PACKAGE)
    python: str = platform.python_version()
    executable: str = sys.executable
    processor: str = ""
    threads: int | None = None
    torch: str | None = None
    torch_error: str | None = None
    torch_cuda: str | None = None
    driver: str | None = None
    devices: list[str] = field(default_factory=list)
    cpu_library: str = ""
    cpu_error: str | None = None
    cpu_isas: list[str] = field(default_factory=list)
    cpu_isa: str | None = None
    cuda_library: str = ""
    cuda_obstacle: str | None = None
    cuda_archs: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    operators: list[Operator] = field(default_factory=list)
    packages: list[dict[str, str | None]] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    usable: bool = False


def run(*, json: bool = False) -> int:
    """Says which backends work on this machine, why the others do not, and what to do.

    Args:
        json: print one JSON object for programs instead of text.

    Returns:
        0 when the compiled CPU library is usable, 1 when it is not.
    """
    report = examine()
    print(json_format.dumps(asdict(report), indent=2) if json else render(report))
    return 0 if report.usable else 1


def examine() -> Report:
    """Looks at everything; never raises for something that is missing or broken."""
    report = Report(processor=_processor(), driver=_driver())
    report.environment = {
        name: value for name, value in sorted(os.environ.items()) if name.startswith("SOFTDIMO_")
    }
    report.packages = [_look_up(package, required=True) for package in REQUIRED]
    report.packages += [_look_up(package, required=False) for package in OPTIONAL]
    report.packages.append(_look_up_apex())
    _examine_torch(report)
    if report.torch is not None:
        _examine_libraries(report)
    report.usable = report.cpu_isa is not None
    if report.usable:
        report.operators = _operators(report)
    report.advice = _advice(report)
    return report


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    """The NVIDIA driver's version: from NVML, or from the kernel module where nvidia-ml-py is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except (
        Exception
    ):  # not installed, no driver, or a driver that does not answer: all mean "not this way"
        pass
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def _look_up(package: Package, *, required: bool) -> dict[str, str | None]:
    version: str | None = None
    if importlib.util.find_spec(package.module) is not None:
        try:
            version = importlib.metadata.version(package.name)
        except importlib.metadata.PackageNotFoundError:
            version = "unknown version"
    return {
        "name": package.name,
        "kind": "required" if required else "optional",
        "version": version,
        "purpose": package.purpose,
        "command": f"pip install '{package.requirement}'",
    }


def _look_up_apex() -> dict[str, str | None]:
    """NVIDIA's apex, told from the unrelated project of that name by what only NVIDIA's has."""
    found: str | None = None
    try:
        from apex.optimizers import FusedAdam  # noqa: F401

        found = "installed"
    except Exception:  # missing, the other project, or built for another torch: it cannot be used
        pass
    return {
        "name": "apex (NVIDIA)",
        "kind": "optional",
        "version": found,
        "purpose": "fused optimizers",
        "command": APEX_COMMAND,
    }


def _examine_torch(report: Report) -> None:
    try:
        import torch
    except Exception as error:  # a broken torch raises ImportError, OSError or its own kinds
        report.torch_error = f"{type(error).__name__}: {error}"
        return
    report.torch = str(torch.__version__)
    report.torch_cuda = torch.version.cuda
    report.threads = torch.get_num_threads()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            report.devices.append(
                f"{device.name}, capability {device.major}.{device.minor}, "
                f"{device.total_memory / 2**30:.0f} GiB"
            )


def _examine_libraries(report: Report) -> None:
    folder = Path(report.environment.get("SOFTDIMO_LIBRARY_DIR") or PACKAGE)
    report.cpu_library, report.cuda_library = str(folder / "_cpu.so"), str(folder / "_cuda.so")
    try:
        from softdimo_fast.ops import _library

        report.cpu_isas = _library.compiled_cpu_isas()
        report.cpu_isa = _library.cpu_isa()
    except (ImportError, OSError, RuntimeError) as error:
        report.cpu_error = _first_line(error)
        return
    report.cuda_obstacle = _library.CUDA_OBSTACLE
    if report.cuda_obstacle is None:
        report.cuda_archs = _library.compiled_cuda_archs()


def _first_line(error: Exception) -> str:
    """The message without the C++ stack that torch appends."""
    return str(error).partition("\n")[0]


def _operators(report: Report) -> list[Operator]:
    from softdimo_fast.ops import _explain

    found = []
    for fn in _explain.operators():
        found.append(_examine_operator(fn, "cpu"))
        if report.devices:
            found.append(_examine_operator(fn, "cuda"))
        else:
            obstacles = found[-1].obstacles
            obstacles["cuda"] = _cuda_without_device(obstacles["cuda"], report)
    return found


def _examine_operator(fn: Callable[..., Any], device: str) -> Operator:
    from softdimo_fast.ops import _backends
    from softdimo_fast.ops._explain import explain

    arguments = _tiny_arguments(fn, device)
    obstacles: dict[str, str | None] = {}
    for backend in _backends.BACKENDS:
        try:
            explain(fn, *arguments, backend=backend)
            obstacles[backend] = None
        except ValueError as error:
            obstacles[backend] = str(error).partition("cannot run: ")[2] or str(error)
    default = explain(fn, *arguments)
    dtype = str(arguments[0].dtype).removeprefix("torch.")
    return Operator(fn.__name__, device, dtype, default.backend, default.kernel, obstacles)


def _tiny_arguments(fn: Callable[..., Any], device: str) -> list[Any]:
    """The smallest call of ``fn``: its positional arguments, recognised by their names."""
    import inspect

    import torch

    # What training uses: float32 on the CPU, bfloat16 on a device.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows, vocabulary, width = 2, 8, 4
    shapes: dict[str, tuple[int, ...]] = {
        "codebook": (vocabulary, width),
        "weight": (vocabulary, width),
        "hidden": (rows, width),
        "query": (1, 1, rows, width),
        "key": (1, 1, rows, width),
        "value": (1, 1, rows, width),
    }
    arguments: list[Any] = []
    for name, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            continue
        if name == "mask":
            arguments.append(torch.ones(rows, dtype=torch.bool, device=device))
        elif name == "targets":
            arguments.append(torch.zeros(rows, dtype=torch.int64, device=device))
        else:
            shape = shapes.get(name, (rows, vocabulary))
            arguments.append(torch.zeros(shape, dtype=dtype, device=device))
    return arguments


def _cuda_without_device(found: str | None, report: Report) -> str:
    """Why no CUDA kernel runs where there is no device; ``found`` is what a call on the CPU was told."""
    if found is not None and found.startswith(NO_KERNEL):
        return found
    return report.cuda_obstacle or "compiled, but torch sees no CUDA device"


def _advice(report: Report) -> list[str]:
    """What is missing or wrong, each with its remedy; empty when all is well."""
    advice = []
    if report.torch is None:
        advice.append(
            f"torch cannot be imported ({report.torch_error}). Install it before this package, so that "
            "the build you want is used: pip install 'torch>=2.11'"
        )
    elif report.cpu_error is not None:
        advice.append(report.cpu_error)
    for package in report.packages:
        if (
            package["kind"] == "required"
            and package["version"] is None
            and package["name"] != "torch"
        ):
            advice.append(f"{package['name']} is required and missing: {package['command']}")
    for name in report.environment:
        if name not in VARIABLES:
            advice.append(
                f"{name} is set, but nothing reads it; the names that are read: "
                f"{', '.join(sorted(VARIABLES))}"
            )
    return advice + _cuda_advice(report)


def _cuda_advice(report: Report) -> list[str]:
    if report.torch is None or report.driver is None:
        return []
    if report.torch_cuda is None:
        return [
            f"An NVIDIA driver ({report.driver}) is here, but torch {report.torch} is a CPU build: install "
            "a CUDA build of torch."
        ]
    if not report.devices:
        return [
            f"An NVIDIA driver ({report.driver}) is here, but torch {report.torch} (CUDA "
            f"{report.torch_cuda}) sees no device: check CUDA_VISIBLE_DEVICES, and that the driver is new "
            "enough for that CUDA."
        ]
    if report.usable and report.cuda_obstacle is not None:
        return [
            f"There is a CUDA device, but {report.cuda_obstacle}. Install a CUDA toolkit (nvcc) and build "
            "again: pip install -e ."
        ]
    return []


def render(report: Report) -> str:
    """The report as plain text of at most about 100 columns."""
    sections = [
        _table(f"softdimo_fast {report.version}", _machine_rows(report)),
        _table("Compiled libraries", _library_rows(report)),
        _table("Environment", _environment_rows(report)),
        *_operator_sections(report),
        _table("Packages", _package_rows(report)),
        _what_to_do(report.advice),
    ]
    return "\n\n".join(sections)


def _machine_rows(report: Report) -> list[tuple[str, str]]:
    cuda = f"CUDA {report.torch_cuda}" if report.torch_cuda else "a CPU build"
    threads = "" if report.threads is None else f", {report.threads} threads"
    rows = [
        ("folder", report.folder),
        ("Python", f"{report.python}, {report.executable}"),
        ("torch", f"{report.torch}, {cuda}" if report.torch else f"missing: {report.torch_error}"),
        ("processor", report.processor + threads),
        ("driver", report.driver or "no NVIDIA driver found"),
    ]
    rows += [(f"cuda:{index}", device) for index, device in enumerate(report.devices)]
    return rows if report.devices else [*rows, ("devices", "torch sees no CUDA device")]


def _library_rows(report: Report) -> list[tuple[str, str]]:
    if not report.usable:
        return [("CPU", f"not usable: {report.cpu_error or 'torch is needed first'}")]
    cuda = f"not usable: {report.cuda_obstacle}"
    if report.cuda_obstacle is None:
        cuda = f"loaded from {report.cuda_library}, compiled for {', '.join(report.cuda_archs)}"
    return [
        ("CPU", f"loaded from {report.cpu_library}"),
        ("", f"runs {report.cpu_isa}; compiled for {', '.join(report.cpu_isas)}"),
        ("CUDA", cuda),
    ]


def _environment_rows(report: Report) -> list[tuple[str, str]]:
    if not report.environment:
        return [("(none)", "no SOFTDIMO_ variable is set")]
    return [
        (f"{name}={value}", VARIABLES.get(name, "nothing reads this name"))
        for name, value in report.environment.items()
    ]


def _operator_sections(report: Report) -> list[str]:
    sections = []
    for device, title in (("cpu", "on the CPU"), ("cuda", "on CUDA")):
        operators = [operator for operator in report.operators if operator.device == device]
        if not operators:
            continue
        rows: list[tuple[str, str]] = []
        for operator in operators:
            rows.append((operator.name, f"runs {operator.chosen}: {operator.kernel}"))
            rows += [("", line) for line in _backend_lines(operator)]
        sections.append(_table(f"Operators {title}, {operators[0].dtype}", rows))
    return sections


def _backend_lines(operator: Operator) -> list[str]:
    """The other backends that can, those that have no kernel, and why the rest cannot."""
    able = [
        name for name, why in operator.obstacles.items() if why is None and name != operator.chosen
    ]
    lines = [f"also {', '.join(able)}"] if able else []
    without = []
    for name, why in operator.obstacles.items():
        if why is None or "tensors, these are on" in why:
            continue  # kernels for another device: that goes without saying
        if why.startswith(NO_KERNEL):
            without.append(name)
        else:
            lines.append(f"not {name}: {why}")
    return [*lines, f"no kernel: {', '.join(without)}"] if without else lines


def _package_rows(report: Report) -> list[tuple[str, str]]:
    rows = []
    for package in report.packages:
        state = f"{package['version'] or 'missing':<16} {package['purpose']}"
        if package["version"] is None:
            state += f"; {package['command']}"
        rows.append((str(package["name"]), state))
    return rows


def _what_to_do(advice: list[str]) -> str:
    if not advice:
        return "What to do\n  Nothing: all that this machine can use is in place."
    return "\n".join(
        ["What to do", *(_wrapped(f"  {i}. ", text) for i, text in enumerate(advice, 1))]
    )


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(_wrapped(f"  {name:<{width}}  ", text) for name, text in rows)])


def _wrapped(start: str, text: str) -> str:
    """``text`` after ``start``, its further lines below its first; paths and commands are never cut."""
    return textwrap.fill(
        text,
        width=max(100, len(start) + 40),
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )
