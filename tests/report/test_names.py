"""Display names of models."""

import pytest
from reports import result_of

from calm.report.names import model_name, names_of


@pytest.mark.parametrize(
    ("chunk_size", "head", "with_head", "name"),
    [
        (4, "energy", True, "CALM, K = 4, energy head"),
        (8, "categorical_flow", True, "CALM, K = 8, categorical flow head"),
        (1, "energy", False, "CALM, K = 1"),
        (1, None, True, "Transformer"),
        (1, None, False, "Transformer"),
    ],
)
def test_name_has_chunk_size_and_head(chunk_size, head, with_head, name):
    assert model_name(chunk_size, head, with_head=with_head) == name


BASELINE = {"head": None, "chunk_size": 1}


@pytest.mark.parametrize(
    ("models", "names"),
    [
        ([{}, BASELINE], ["CALM, K = 4", "Transformer"]),
        ([{"chunk_size": 2}, {}], ["CALM, K = 2", "CALM, K = 4"]),
        (
            [{}, {"head": "sequential"}, BASELINE],
            ["CALM, K = 4, energy head", "CALM, K = 4, sequential head", "Transformer"],
        ),
        ([{}, {}, {"chunk_size": 8}], ["CALM, K = 4 (a)", "CALM, K = 4 (b)", "CALM, K = 8"]),
        ([BASELINE, BASELINE, {}], ["Transformer (a)", "Transformer (b)", "CALM, K = 4"]),
    ],
)
def test_names_include_head_and_run_only_to_tell_models_apart(models, names):
    assert names_of([result_of(run, **model) for run, model in zip("abc", models, strict=False)]) == names
    assert len(set(names)) == len(names)
