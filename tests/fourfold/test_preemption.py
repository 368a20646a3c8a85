"""Signals become a flag; a second SIGINT still interrupts."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from fourfold.runtime.preemption import Preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_handlers_come_back(number):
    before = [signal.getsignal(n) for n in Preemption.SIGNALS]
    with Preemption() as preemption:
        assert not preemption.requested and not preemption.agreed()
        os.kill(os.getpid(), number)
        assert preemption.requested and preemption.agreed()
    assert [signal.getsignal(n) for n in Preemption.SIGNALS] == before
    line = preemption.farewell(1200, "jaxrl train --resume runs/a")
    assert line == (
        f"Stopped by {number.name} at step 1200, saved. Resume: jaxrl train --resume runs/a"
    )


def test_a_second_interrupt_is_obeyed_at_once():
    with pytest.raises(KeyboardInterrupt), Preemption():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_does_not_disturb_the_save():
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested


def test_other_threads_can_only_be_asked():
    found = []

    def run():
        with Preemption() as preemption:
            preemption.request("the test")
            found.append(preemption.farewell(3, "again"))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == ["Stopped by the test at step 3, saved. Resume: again"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/opt/bin/jaxrl", "train", "--game", "My Game"], "jaxrl train --game 'My Game' --resume"),
        (["/opt/bin/jaxrl", "train", "--resume"], "jaxrl train --resume"),
        (["train.py", "-n", "1"], "python train.py -n 1 --resume"),
    ],
)
def test_the_farewell_says_how_to_go_on(monkeypatch, argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    preemption = Preemption()
    preemption.request()
    assert preemption.farewell(5).endswith(f"Resume: {expected}")


_LOOP = """
    import sys, time
    from fourfold.runtime.preemption import Preemption
    with Preemption() as preemption:
        print("ready", flush=True)
        for step in range(10_000):
            time.sleep(0.01)
            if preemption.requested:
                print(preemption.farewell(step, "again"))
                break
        else:
            sys.exit(3)
"""


def test_a_terminated_process_exits_with_zero():
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_LOOP)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 0
    assert rest.startswith("Stopped by SIGTERM at step") and rest.endswith("Resume: again\n")
