"""NVRTC compiles every kernel for sm_80 and sm_90: no warning, no spill, no more registers than
`kernel_registers.json` says.

`python tests/test_kernel_build.py` writes that table again.
"""

import ctypes
import importlib
import json
import pkgutil
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import minilora.fast
from minilora.fast.cuda import FOLDER, Kernels

pytestmark = pytest.mark.peers
TABLE = Path(__file__).parent / "kernel_registers.json"
CARDS = ("sm_80", "sm_90")
CUPY = ("-ftz=true", "--device-as-default-execution-space")  # CuPy 14.2 adds these to ours


def every_kernels():
    """All `Kernels` of the library, alone or as the values of a dict."""
    found = {}
    for info in pkgutil.iter_modules(minilora.fast.__path__, "minilora.fast."):
        for value in vars(importlib.import_module(info.name)).values():
            for one in value.values() if isinstance(value, dict) else [value]:
                if isinstance(one, Kernels):
                    found[f"{one.file}: {', '.join(one.names)}"] = one
    return list(found.values())


@cache
def nvrtc():
    """The library of the wheel nvidia-cuda-nvrtc; None without one."""
    places = find_spec("nvidia")
    for place in places.submodule_search_locations if places else ():
        for path in sorted(Path(place).glob("*/lib/libnvrtc.so.*")):
            if "alt" not in path.name:
                return ctypes.CDLL(str(path))
    return None


def text_of(library, what, program):
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, text)
    return text.value.decode()


def compiled(kernels, card, source=None, more=()):
    """(log, {name: (registers, bytes of spills)}) of one source for one card."""
    library, program = nvrtc(), ctypes.c_void_p()
    source = (source or kernels.source()).encode()
    library.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None)
    for name in kernels.names:
        library.nvrtcAddNameExpression(program, name.encode())
    options = [*kernels.options, *CUPY, f"-arch={card}", "--ptxas-options=-v", *more]
    words = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    status = library.nvrtcCompileProgram(program, len(options), words)
    log = text_of(library, "ProgramLog", program)
    assert status == 0, log
    used = {}
    for name in kernels.names:
        lowered = ctypes.c_char_p()
        library.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(lowered))
        found = re.search(
            rf"properties for {re.escape(lowered.value.decode())}\n(?:.*\n)??.*?"
            r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers",
            log,
        )
        assert found, f"{name}: no report in\n{log}"
        used[name] = int(found[3]), int(found[1]) + int(found[2])
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return log, used


@pytest.fixture(autouse=True)
def has_nvrtc():
    if nvrtc() is None:
        pytest.skip("needs the wheel nvidia-cuda-nvrtc")


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("kernels", every_kernels(), ids=lambda k: f"{k.file} {k.names[0]}")
def test_it_compiles_and_spills_nothing(kernels, card):
    limits = json.loads(TABLE.read_text())[card]
    log, used = compiled(kernels, card)
    assert "warning" not in log
    for name, (registers, spilled) in used.items():
        assert spilled == 0, name
        granted = -(-limits[name] // 8) * 8  # a card gives them out by eights
        assert registers <= granted, name


def test_every_kernel_is_in_the_table_and_every_file_is_compiled():
    names = {name for kernels in every_kernels() for name in kernels.names}
    table = json.loads(TABLE.read_text())
    assert all(table[card].keys() == names for card in CARDS)
    files = {file for kernels in every_kernels() for file in kernels.file.split()}
    assert files == {path.name for path in FOLDER.glob("*.cu")} - {"common.cu"}


def test_a_spill_and_a_slip_are_seen():
    kernels = next(k for k in every_kernels() if "adamw" in k.names)
    _, used = compiled(kernels, "sm_90", more=["--maxrregcount=24"])
    assert used["adamw"][1] > 0
    with pytest.raises(AssertionError, match="factr"):
        compiled(kernels, "sm_90", kernels.source().replace("s.factor", "s.factr"))


if __name__ == "__main__":
    table = {card: {} for card in CARDS}
    for kernels in every_kernels():
        for card in CARDS:
            table[card] |= {n: used for n, (used, _) in compiled(kernels, card)[1].items()}
    table = {card: dict(sorted(names.items())) for card, names in table.items()}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
