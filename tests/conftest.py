"""The suite's budget in CPU-seconds, child processes included: ``TEST`` for one test, ``SYSTEM`` for all tests of a system.

A test belongs to the system whose slug it is parametrised with, or whose name its file bears. CPU-seconds are those of a machine
that counts to 400 000 in ``REFERENCE`` seconds; a slower one gets more, and one that is slower by ``CALM`` fails nothing. Where more
processes than cores compete for the caches CPU time grows too, so it is divided by the load per core. What is made once and kept
does not count: see ``made_once``.
"""

import os
import time
from collections import defaultdict
from importlib.util import find_spec

import pytest

from interlayer import catalog

TEST, SYSTEM = 4.0, 9.0
CALM = 1.25  # a machine still slower is shared or throttled: too rough a clock to fail by
REFERENCE = 0.0175
BEGUN, EXEMPT, SPENT, PACE = (pytest.StashKey() for _ in range(4))


def pace():
    """How much slower this machine is than the reference, at least 1."""
    times = []
    for _ in range(3):
        start, total = time.process_time(), 0
        for i in range(400_000):
            total += i * i
        times.append(time.process_time() - start)
    return max(1.0, min(times) / REFERENCE)


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
    """Make the data sets and the model that are kept as files, and start compiler and profiler, before the first test pays for it."""
    start = clock(request.config)
    import torch
    import torch._dynamo

    from interlayer.core.cost import peak_bytes
    from interlayer.core.datasets import mnist1d, speech
    from interlayer.study.token_kinds import upstream

    mnist1d()
    if find_spec("espeakng_loader"):
        speech()
    upstream()
    peak_bytes(lambda: torch.zeros(1) + 1)
    request.config.stash[EXEMPT] += clock(request.config) - start


def pytest_configure(config):
    config.stash[EXEMPT], config.stash[SPENT], config.stash[PACE] = 0.0, defaultdict(float), pace()
    config.pluginmanager.register(Budget(config), "budget")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    item.stash[BEGUN] = clock(item.config)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.when == "call":
        crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        spent = clock(item.config) - item.stash[BEGUN]
        if spent > 0.5:  # a machine that others use changes its pace within minutes
            item.config.stash[PACE] = pace()
        spent /= crowd * item.config.stash[PACE]
        report.user_properties += [
            ("cpu", spent if item.config.stash[PACE] < CALM else 0.0),
            ("system", system_of(item)),
        ]
        if report.passed and spent > TEST and item.config.stash[PACE] < CALM:
            report.outcome, report.sections = "failed", []
            report.longrepr = f"{item.nodeid} takes {spent:.1f} CPU-seconds; a test may take {TEST:g}. Make it smaller."
    return report


class Budget:
    """Adds up what the tests of a system take, of all workers in the process that prints."""

    def __init__(self, config):
        self.spent = config.stash[SPENT]

    def pytest_runtest_logreport(self, report):
        found = dict(report.user_properties)
        if report.when == "call" and found["system"]:
            self.spent[found["system"]] += found["cpu"]

    def over(self):
        return {slug: spent for slug, spent in self.spent.items() if spent > SYSTEM}

    def pytest_sessionfinish(self, session):
        if self.over() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for slug, spent in self.over().items():
            terminalreporter.write_line(
                f"FAILED {slug}: its tests take {spent:.1f} CPU-seconds in all; a system may take {SYSTEM:g}. Make them smaller.",
                red=True,
            )
