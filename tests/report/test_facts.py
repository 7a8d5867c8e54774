"""Facts about a run, some of which may be unknown."""

import datetime
from importlib.metadata import version

import torch

import calm
from calm.hardware import device_name
from calm.report.facts import Provenance, RunFacts, StageFacts, here_and_now


def test_the_provenance_of_this_process():
    provenance = here_and_now()
    assert (
        provenance.date.tzinfo is not None
        and abs(datetime.datetime.now().astimezone() - provenance.date).days == 0
    )
    assert provenance.software == {
        "calm": calm.__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    assert (
        provenance.words[0] == provenance.day and provenance.words[1] == provenance.hardware == device_name()
    )
    assert here_and_now(8).hardware == f"8 x {device_name()}"
    assert f"torch {torch.__version__}" in provenance.words


def test_unknown_provenance_is_left_out():
    assert Provenance().words == [] and Provenance().day is None
    date = datetime.datetime(2026, 7, 9, 23, 59, tzinfo=datetime.timezone.utc)
    assert Provenance(date=date).words == ["9 July 2026"]
    assert Provenance(hardware="A processor").words == ["A processor"]


def test_sums_are_known_if_all_their_parts_are():
    first = StageFacts("autoencoder", 10, 1000, flops=2e9, seconds=3.0)
    second = StageFacts("language_model", 20, 4000, flops=5e9, seconds=4.0)
    facts = RunFacts("CALM", {"head": 1}, [first, second], has_trained_autoencoder=True)
    assert (facts.tokens, facts.flops, facts.seconds) == (4000, 7e9, 7.0)
    unknown = StageFacts("language_model", 20, 4000)
    facts = RunFacts("CALM", {"head": 1}, [first, unknown], has_trained_autoencoder=True)
    assert (facts.tokens, facts.flops, facts.seconds) == (4000, None, None)
    facts = RunFacts("CALM", {"head": 1}, [], has_trained_autoencoder=False)
    assert (facts.tokens, facts.flops, facts.seconds) == (0, None, None)
