"""Every system of the catalogue that has code is held to the contracts of its kind; nobody has to enrol it."""

import pytest

from interlayer import catalog
from interlayer.testing import contracts, example_of, hold

WRITTEN = [s for s in catalog.load().values() if s.code and s.source.exists()]
CASES = [pytest.param(s, name, id=f"{s.slug}-{name}") for s in WRITTEN for name in contracts(s.kind)]


@pytest.mark.parametrize(("system", "name"), CASES)
def test_contract(system, name):
    assert hold(name, system.kind, example_of(system.resolve()))


@pytest.mark.parametrize("system", WRITTEN, ids=lambda s: s.slug)
def test_exceptions_are_declared_to_contracts_that_there_are(system):
    declared = example_of(system.resolve()).exceptions
    assert set(declared) <= set(contracts(system.kind)) and all(declared.values())
