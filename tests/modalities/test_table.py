"""Rows of a table and the FT-Transformer: tokens of what is there, nothing from what is missing,
the paper's formula for a token.
"""

import numpy as np
import pyarrow as pa
import pytest
import torch
from toys import stays, table_rows, take

from pipeline.checkpoints import bundle
from pipeline.core.specs import Architecture
from pipeline.modalities.table import Table, TableOptions

COLUMNS = {"features": "static"}


def built(inputs, **options):
    chosen = {"width": 16, "layers": 2, "heads": 2, **options}
    return bundle.build_backbone(
        Architecture("table/ft_transformer", chosen, inputs), seed=1
    ).eval()


def test_null_features_are_bad_rows_and_gaps_are_not():
    modality = Table(TableOptions(), Table.fit(TableOptions(min_rows=1), stays(8), COLUMNS, ""))
    table = pa.table(
        {
            "static": pa.array(
                [None, {"Age": None, "Gender": None, "codes": None}], stays(1)["static"].type
            )
        }
    )
    arrays, bad = modality.decode(table, COLUMNS)
    assert bad == ["the features are null", ""] and not arrays["numbers_known"].any()
    batch = modality.collate(arrays)
    assert batch["codes"].shape == (2, 1) and not batch["codes"].any()


def test_what_nothing_can_be_learned_of_is_refused():
    with pytest.raises(
        ValueError, match="no field holds a number, or a text that 10 of 1 rows have"
    ):
        Table.fit(TableOptions(), pa.table({"static": pa.array([{"a": "x"}])}), COLUMNS, "")


def test_fields_that_are_not_known_are_reported():
    modality = Table(TableOptions(), Table.fit(TableOptions(min_rows=1), stays(8), COLUMNS, ""))
    assert modality.coverage(stays(8), COLUMNS) == ""
    assert (
        modality.coverage(pa.table({"static": pa.array([{"Age": 3.0, "Weight": 80.0}])}), COLUMNS)
        == "numbers of static left out: Weight"
    )


def test_rows_whose_names_are_all_others_are_refused_and_few_known_values_are_counted():
    modality = Table(TableOptions(), Table.fit(TableOptions(min_rows=1), stays(8), COLUMNS, ""))

    def share(**fields):
        return modality.check_known_share(pa.table({"static": pa.array([fields])}), COLUMNS)

    assert modality.check_known_share(stays(8), COLUMNS) == 1
    assert share(Age=3.0, Weight=80.0, Gender="male", ward="a") == 0.5
    assert share(age=None) == 1, "rows without a value lack nothing"
    with pytest.raises(
        ValueError,
        match=r"^column static: the source knows none of the values in these rows, whose names are "
        r"Gender \(with other texts\), age \(did you mean Age\?\), x7; the source knows Age, Gender, "
        r"codes: ",
    ):
        share(age=3.0, Gender="SECRET", x7=1.0)


def assert_prepares_as_decoded(code, modality, rows):
    """The inputs that a README's code makes of rows are those of the modality."""
    arrays, _ = modality.decode(pa.table({"static": pa.array(rows)}), COLUMNS)
    expected = modality.collate(arrays)
    described = {"modality": {"state": modality.state}, "inputs": dict.fromkeys(expected)}
    names = {"np": np, "graph": described, "rows": rows}
    exec(code, names)
    for name, tensor in expected.items():
        np.testing.assert_allclose(names["inputs"][name], tensor.numpy(), rtol=1e-6)


def test_the_code_beside_an_export_prepares_rows_as_the_modality_does():
    modality = Table(TableOptions(), Table.fit(TableOptions(min_rows=1), stays(8), COLUMNS, ""))
    rows = [*stays(8)["static"].to_pylist(), {"Age": 1e9, "Gender": "Male", "codes": None}]
    given, _, code = modality.preparation_code().partition("\n")
    example = [modality.static_features.example_row()]
    assert_prepares_as_decoded(code, modality, rows)
    assert_prepares_as_decoded(code, modality, example)
    assert eval(given.removeprefix("rows = ")) == example


def test_the_code_beside_an_export_takes_no_missing_value_for_the_text_none():
    """pandas writes it where a category was missing."""
    rows = [{"smoker": text, "codes": [text]} for text in ("yes", "no", "None")]
    table = pa.table({"static": pa.array(rows)})
    modality = Table(TableOptions(), Table.fit(TableOptions(min_rows=1), table, COLUMNS, ""))
    _, _, code = modality.preparation_code().partition("\n")
    missing = {"smoker": None, "codes": [None, "yes"]}
    assert_prepares_as_decoded(code, modality, [*rows, missing])


@torch.no_grad()
def test_a_token_is_the_papers_formula_and_missing_ones_are_none():
    rows = table_rows(8)
    backbone, batch = built(rows.modality.inputs()), take(rows, np.arange(8))
    tokens, mask = backbone.embed(batch)
    numbers = rows.modality.inputs()["numbers"]
    assert mask.sum(1).tolist() == [
        1 + int(k) + int(c)
        for k, c in zip(batch["numbers_known"].sum(1), (batch["codes"] > 0).sum(1), strict=True)
    ]
    for k in range(numbers):
        expected = batch["numbers"][:, k, None] * backbone.embed.weight[k] + backbone.embed.bias[k]
        torch.testing.assert_close(tokens[:, 1 + k], expected)
    missing = ~batch["numbers_known"]
    assert missing.any()
    other = batch.replace(
        numbers=torch.where(missing, torch.full_like(batch["numbers"], 9.0), batch["numbers"])
    )
    torch.testing.assert_close(backbone(batch).pooled, backbone(other).pooled, rtol=0, atol=0)
    assert (backbone(batch).pooled - backbone(batch.replace(numbers=batch["numbers"] + 1)).pooled)[
        0
    ].abs().max() > 1e-4


def test_the_transformer_of_tables_has_the_papers_parts():
    """Parameters of the default model by the paper's own counts (its table 13): first norm absent,
    ReGLU twice as wide going in.
    """
    backbone = bundle.build_backbone(
        Architecture("table/ft_transformer", {}, {"features": "table", "numbers": 8, "codes": 0}),
        seed=0,
    )
    width, hidden = 192, 256
    block = (
        4 * width * width
        + 4 * width
        + (width * 2 * hidden + 2 * hidden)
        + (hidden * width + width)
        + 2 * width
    )
    tokens = width + 2 * 8 * width + width
    assert (
        sum(p.numel() for p in backbone.parameters())
        == 3 * block + 2 * 2 * width + tokens + 2 * width
    )


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="reads rows of a table"):
        built({"channels": 3})
    with pytest.raises(ValueError, match="width 16 is not divided by heads 3"):
        built(table_rows(4).modality.inputs(), heads=3)
