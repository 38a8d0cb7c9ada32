from __future__ import annotations

import inspect
import re

from citadel_supervisor import errors
from citadel_supervisor.errors import CitadelError, CtlExit, DaemonExit, WorkerExit


def documented_tree() -> dict[str, str]:
    """Each class of the drawing in the module's docstring, with its parent."""
    parents: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ((?:[| ]   )*(?:\+-- )?)(\w+)(?:  |$)", line)
        if match is None:
            continue
        depth = len(match[1]) // 4
        path = [(d, name) for d, name in path if d < depth]
        parents[match[2]] = path[-1][1] if path else "Exception"
        path.append((depth, match[2]))
    return parents


def classes() -> dict[str, type[Exception]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = documented_tree()
    assert len(drawn) > 15, "the drawing can be read"
    actual = {name: value.__bases__[0].__name__ for name, value in classes().items()}
    assert drawn == actual


def test_every_error_is_ours_and_says_what_it_is() -> None:
    for name, value in classes().items():
        assert issubclass(value, CitadelError), name
        assert value.__doc__ and value.__doc__.strip(), name


def test_messages_are_one_line() -> None:
    samples = [
        errors.ConfigError("a.yaml", ["models: missing", "x: unknown"]),
        errors.PortTaken("127.0.0.1:8000", "the router", "pid 12 (nginx)"),
        errors.AlreadyRunning("/run/citadel", "12"),
        errors.NotReady("phi", "loading", "weights 45 %", 5),
        errors.NotReady("phi", "stopped", "", 5),
        errors.UnknownModel("x", ["a", "b"]),
        errors.BodyTooLarge(10),
        errors.DaemonUnreachable("/run/citadel/control.sock", "No such file or directory"),
    ]
    for sample in samples:
        text = str(sample)
        assert text and "\n" not in text and not text.endswith((": ", " "))
    assert str(samples[0]) == "a.yaml: 2 problems: models: missing; x: unknown"
    assert "pid 12 (nginx)" in str(samples[1])
    assert str(samples[4]) == "model 'phi' is stopped"
    assert samples[7].code is CtlExit.UNREACHABLE  # type: ignore[attr-defined]


def test_exit_codes_that_others_rely_on() -> None:
    assert (DaemonExit.CONFIG, DaemonExit.PORT_TAKEN) == (78, 71), "named in the unit"
    assert (WorkerExit.CANNOT_EVER_START, WorkerExit.ENGINE_DIED) == (78, 70)
    for codes in (DaemonExit, WorkerExit, CtlExit):
        assert codes(0).name == "OK"
        assert all(0 <= code < 126 for code in codes), "a shell gives those above a meaning of its own"
