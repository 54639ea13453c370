"""Trainer callbacks. They read what was logged and steer the run; none of them touches the loss."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate.utils import reduce
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _signal_from_launcher(signum: int) -> None:
    """Asks Linux for `signum` when `accelerate launch`, our parent, dies; 0 asks for nothing."""
    # Not of any other parent: a shell may end while its `nohup` run goes on.
    command_line = Path(f"/proc/{os.getppid()}/cmdline")
    if sys.platform == "linux" and command_line.exists() and b"accelerate" in command_line.read_bytes():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)


class RewardProgressCallback(ProgressCallback):
    """
    Progress bar that shows reward and clip fraction in place of a dump of all metrics.

    Where the output is no terminal, each log is a line of its own, without a bar. Goes in place of transformers'
    `ProgressCallback`.
    """

    _LABELS = {
        "reward": "reward",
        "eval_reward": "eval reward",
        "gspo/clip_fraction/sequences": "clipped",
        "completions/mean_length": "length",
    }

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._latest = {}
        for logs in state.log_history:  # of a run that is resumed
            self._latest |= self._shown(logs)
        if self.training_bar is not None and not sys.stderr.isatty():
            self.training_bar.close()
            self.training_bar = tqdm(total=state.max_steps, disable=True)

    def _shown(self, logs: dict) -> dict[str, str]:
        return {label: f"{logs[key]:.3g}" for key, label in self._LABELS.items() if logs.get(key) is not None}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        shown = self._shown(logs)
        if not shown:
            return
        # TRL logs rewards with the step that generates, and nothing of them until the next rollout.
        self._latest |= shown
        if sys.stderr.isatty():
            self.training_bar.set_postfix(self._latest)
        else:
            values = ", ".join(f"{label} {value}" for label, value in self._latest.items())
            print(f"step {state.global_step}/{state.max_steps}: {values}", flush=True)


class StopOnSignalCallback(TrainerCallback):
    """
    Turns Ctrl-C and SIGTERM into a checkpoint at the end of the optimizer step, then ends the training.

    transformers' `enable_jit_checkpoint` answers SIGTERM only, on each rank for itself; here a signal that reaches one
    rank stops all of them at the same step. A second Ctrl-C, later than one second, ends the process at once; sooner,
    it is the first one again, which launchers pass on to workers that the terminal has told already.

    `accelerate launch` with one process dies of a SIGTERM without passing it on. On Linux the kernel then tells us.

    Attributes:
        signum (`int` or `None`): the signal that stopped the run, on every rank; `None` if none did.
    """

    _ECHO_SECONDS = 1.0

    def __init__(self):
        self.signum = None
        self._received = None
        self._received_at = 0.0
        self._previous = {}

    def _handle(self, signum, frame):
        is_late = self._received is not None and time.monotonic() - self._received_at > self._ECHO_SECONDS
        if is_late and signum == signal.SIGINT:
            self._restore()
            raise KeyboardInterrupt
        if self._received is None:
            self._received, self._received_at = signum, time.monotonic()
            name = signal.Signals(signum).name
            # `print` may be in the middle of a write when the signal comes.
            sys.stderr.write(f"\n{name}: saving a checkpoint at the end of this step. Ctrl-C again stops at once.\n")

    def _restore(self):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def on_train_begin(self, args, state, control, **kwargs):
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous[signum] = signal.signal(signum, self._handle)
        _signal_from_launcher(signal.SIGTERM)

    def on_step_end(self, args, state, control, **kwargs):
        received = self._received or 0
        if args.world_size > 1:
            # Signals reach the ranks at different times. A rank that stops alone leaves the others in a collective.
            by_signal = torch.zeros(signal.NSIG, device=args.device)
            by_signal[received] = 1
            reached = reduce(by_signal, "sum")[1:].nonzero().flatten()
            received = int(reached[0]) + 1 if len(reached) else 0
        if received:
            self.signum = received
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        # The final saving has no handler, and must outlive the launcher.
        _signal_from_launcher(0)
        self._restore()
