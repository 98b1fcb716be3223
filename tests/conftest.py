"""What every test has: coroutines as tests, and the output of processes beside a failure."""

from __future__ import annotations

import inspect
from collections.abc import Generator

import pytest
from support import process
from support.running import run


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an ``async def`` test on an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach to a failed test what every process it used has printed."""
    report = yield
    if report.failed:
        report.sections += [(f"process {each.name}", each.transcript()) for each in process.started]
    if call.when == "teardown":
        process.started[:] = [each for each in process.started if not each.closed]
    return report
