"""Every test runs on the device that `--device` names, on one thread, and without a network."""

import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # heard only before numpy is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest

hypothesis.settings.register_profile(
    "minilora",
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get("MINILORA_EXAMPLES", "50")),
)
hypothesis.settings.load_profile("minilora")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "standin", "cuda"),
        default="cpu",
        help="where the arrays of the tests live; standin is tests/standin.py, registered as cupy",
    )


def pytest_configure(config: pytest.Config) -> None:
    for name in ("CI", "BUILD_NUMBER"):  # where pytest sees one, it diffs unequal bytes to the
        os.environ.pop(name, None)  # end: hours for an array, in a planted mistake's test too
    if config.getoption("device") == "standin":
        import standin

        standin.install()


def pytest_report_header(config: pytest.Config) -> str:
    return f"device: {config.getoption('device')}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a card where `--device cuda` is not given or finds none."""
    device = config.getoption("device")
    missing = None if device == "cuda" and has_gpu() else pytest.mark.skip("needs --device cuda")
    for item in items:
        if missing and item.get_closest_marker("gpu"):  # its keywords name folders too
            item.add_marker(missing)


def has_gpu() -> bool:
    try:
        import cupy

        return cupy.cuda.runtime.getDeviceCount() > 0
    except (ImportError, RuntimeError):  # CuPy raises the latter where there is no driver
        return False


# Of the session, all of them, so that Hypothesis may use them.


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device by minilora's name: "cpu" or "cuda"."""
    option = request.config.getoption("device")
    if option == "cuda" and not has_gpu():
        pytest.skip("--device cuda finds no CuPy or no card")
    return "cpu" if option == "cpu" else "cuda"


@pytest.fixture(scope="session")
def xp(device: str) -> ModuleType:
    """The array library of the device."""
    return np if device == "cpu" else sys.modules["cupy"]


@pytest.fixture(scope="session")
def dev(device: str) -> Callable[[Any], Any]:
    """A function that moves a host array to the device."""
    from minilora.engine.backend import to_device

    return lambda array: to_device(array, device)


@pytest.fixture(scope="session")
def host() -> Callable[[Any], np.ndarray]:
    """A function that copies an array of any device to the host."""
    from minilora.engine.backend import to_numpy

    return to_numpy


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """No socket connects beyond this machine."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        yield


def guarded(connect: Callable) -> Callable:
    def guard(self: socket.socket, address: Any) -> Any:
        if self.family != getattr(socket, "AF_UNIX", None) and not is_loopback(address[0]):
            raise RuntimeError(f"tests use no network: connection to {address[0]} refused")
        return connect(self, address)

    return guard


def is_loopback(name: str) -> bool:
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False  # a name, which would have to be looked up


@pytest.fixture
def in_a_minute():
    """A test that waits for ever fails."""

    def late(number, frame):
        raise TimeoutError("still waiting after a minute")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def where_it_forks(device):
    from minilora.engine.forked import can_fork

    if device != "cpu" or not can_fork():
        pytest.skip("nothing is forked here")
    pytest.importorskip("threadpoolctl")
