"""The suite's budget in CPU-seconds, child processes included: ``TEST`` for one test, ``SYSTEM`` for all tests of a system.

A test belongs to the system whose slug it is parametrised with, or whose name its file bears. What is made once and kept does not
count: see ``made_once``. Whatever is over its budget is listed after each run. CPU-seconds double on a machine that is shared or
throttled, and rise with a second worker, so only ``make budget``, one process for a quiet machine, fails by them.
"""

import os
import random
from collections import defaultdict
from importlib.util import find_spec

import pytest

from interlayer import catalog

TEST, SYSTEM = 4.0, 9.0
BEGUN, EXEMPT = pytest.StashKey(), pytest.StashKey()


def clock(config):
    """CPU-seconds of this process and of its ended children so far, without those that count for no test."""
    return sum(os.times()[:4]) - config.stash[EXEMPT]


def system_of(item):
    """The slug of the system that a test belongs to; empty for none."""
    systems = catalog.load()
    for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
        slug = getattr(value, "slug", value)
        if isinstance(slug, str) and slug in systems:
            return slug
    return next((s.slug for s in systems.values() if s.test == item.path), "")


@pytest.fixture(scope="session", autouse=True)
def made_once(request):
    """Make the data sets and the model that are kept, and start compiler and profiler, before the first test pays for it."""
    start = clock(request.config)
    import torch

    from interlayer.core.cost import peak_bytes
    from interlayer.core.datasets import mnist1d, photographs, speech
    from interlayer.study.token_kinds import upstream
    from interlayer.transform.adapt import _tuned

    mnist1d()
    if find_spec("espeakng_loader"):
        speech()
    upstream()
    if find_spec("skimage"):
        photographs()
    _tuned.upstream()
    peak_bytes(lambda: torch.zeros(1) + 1)
    x = torch.ones(2, requires_grad=True)
    x.sum().backward()  # an engine that a compiled graph has started is of no use in forked processes
    torch.compile(torch.sin, backend="aot_eager")(x).sum().backward()
    torch._dynamo.config.recompile_limit = 256  # tests compile more layers of one class than a program does
    request.config.stash[EXEMPT] += clock(request.config) - start


@pytest.fixture(autouse=True)
def same_numbers(made_once):
    """Random numbers that don't depend on which tests ran before."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--budget", action="store_true", help="fail where tests take more CPU-seconds than they may")


def pytest_configure(config):
    config.stash[EXEMPT] = 0.0
    config.pluginmanager.register(Budget(config.getoption("--budget")), "budget")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    item.stash[BEGUN] = clock(item.config)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.when == "call":
        report.user_properties += [("cpu", clock(item.config) - item.stash[BEGUN]), ("system", system_of(item))]
    return report


class Budget:
    """Adds up what tests and systems take, of all workers in the process that prints."""

    def __init__(self, held):
        self.held, self.tests, self.systems = held, {}, defaultdict(float)

    def pytest_runtest_logreport(self, report):
        found = dict(report.user_properties)
        if report.when == "call":
            self.tests[report.nodeid] = found["cpu"]
            if found["system"]:
                self.systems[found["system"]] += found["cpu"]

    def over(self):
        systems = {f"all tests of {slug}": spent for slug, spent in self.systems.items() if spent > SYSTEM}
        return {name: spent for name, spent in self.tests.items() if spent > TEST} | systems

    def pytest_sessionfinish(self, session):
        if self.held and self.over() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        over = self.over()
        if over:
            terminalreporter.section(f"over the budget of {TEST:g} CPU-seconds for a test, {SYSTEM:g} for a system")
        for name, spent in sorted(over.items(), key=lambda pair: -pair[1]):
            terminalreporter.write_line(f"{spent:5.1f}  {name}", red=self.held)
