"""Records this process while a window is open: with torch's profiler into a Chrome trace, or by telling Nsight Systems,
under which the process was started, when to capture. It decides neither when nor whether.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from engine.core.errors import ConfigError
from engine.core.files import atomic_write
from engine.observe.profiling.phases import Phase, phase

if TYPE_CHECKING:
    import torch.profiler

FOLDER = "profile"  # in the run's directory
MAX_DECODES = 2000  # of one window in one engine: a step of vLLM is some thousand events


def profiled_process(kind: Literal["rank", "engine"], index: int) -> str:
    """What a process's files are called, without their ending."""
    return f"{kind}-{index}"


class Recorder:
    """The profile of one process, for one window. `start` and `stop` are called on the thread that does the work.

    Of torch's profiler names and times are kept, of operators and, where there is a GPU, of its kernels; no shapes, stacks
    or memory.
    """

    def __init__(
        self, tool: Literal["torch", "nsys"], directory: Path, name: str, capture: Callable[[bool], object] | None = None
    ) -> None:
        """`directory` is the run's, `name` the process's (`profiled_process`). `capture(on)` tells nsys when; this process
        itself does where there is none, which takes a CUDA context. ConfigError for nsys without a GPU: nothing could."""
        import torch

        if tool == "nsys" and not torch.cuda.is_available():
            raise ConfigError("profile.tool = 'nsys' needs a CUDA device; found none: use 'torch'")
        self._tool, self.file = tool, directory / FOLDER / f"{name}.json"
        self._capture, self._decodes_left = capture or capture_here, MAX_DECODES
        self._profiler: torch.profiler.profile | None = None
        self._window: AbstractContextManager[None] | None = None

    @property
    def recording(self) -> bool:
        """Whether the window is open."""
        return self._window is not None

    def start(self) -> None:
        """Opens the window."""
        import torch

        assert not self.recording
        if self._tool == "nsys":
            self._capture(True)
        else:
            kinds = torch.profiler.ProfilerActivity
            activities = [kinds.CPU, kinds.CUDA] if torch.cuda.is_available() else [kinds.CPU]
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
        self._window = phase(Phase.WINDOW)
        self._window.__enter__()

    def stop(self) -> None:
        """Closes the window; the trace of torch's profiler appears whole or not at all."""
        import torch

        assert self._window is not None
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # kernels launched in the window belong to it
        self._window.__exit__(None, None, None)
        self._window = None
        if self._profiler is None:
            self._capture(False)
            return
        self._profiler.stop()
        with atomic_write(self.file) as part:
            self._profiler.export_chrome_trace(str(part))
        self._profiler = None

    def decoded(self) -> None:
        """An engine has done a step of vLLM; the window closes early after MAX_DECODES of them."""
        if self.recording:
            self._decodes_left -= 1
            if not self._decodes_left:
                self.stop()


def capture_here(on: bool) -> None:
    """Has Nsight Systems, where it listens, begin or end what it captures of this process."""
    import torch

    if on:
        torch.cuda.profiler.start()
    else:
        torch.cuda.synchronize()  # kernels launched so far belong to it
        torch.cuda.profiler.stop()
