"""Cohorts and labels: stays whose labels were worked out by hand, and all definitions against a
plain loop over stays, after the published text.
"""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import registry
from pipeline.prepare.cohorts import definition as cohort
from pipeline.prepare.cohorts import phenotyping

SCHEMA = pa.schema(
    [
        ("entity", pa.int64()),
        ("patient", pa.int64()),
        ("times", pa.list_(pa.float32())),
        ("variables", pa.list_(pa.string())),
        ("values", pa.list_(pa.float32())),
        ("events", pa.int32()),
        (
            "static",
            pa.struct([("Age", pa.float64()), ("Gender", pa.string()), ("CareUnit", pa.string())]),
        ),
        ("hospital_death", pa.int8()),
        ("death_hours", pa.float64()),
        ("icu_hours", pa.float64()),
        ("discharge_hours", pa.float64()),
        ("icd9", pa.list_(pa.string())),
        ("readmission_days", pa.float64()),
        ("next_icd9", pa.list_(pa.string())),
        ("care_unit", pa.string()),
        ("dbsource", pa.string()),
        ("stays_in_admission", pa.int32()),
        ("transfers", pa.bool_()),
        ("split", pa.string()),
    ]
)


def stay(
    entity: int = 1,
    hours: float | None = 60.0,
    times=(0.5, 1.5, 30.0),
    died: float | None = None,
    age: float | None = 70.0,
    **other,
) -> dict:
    """One stay: ``died`` is the hour of death in the hospital."""
    return {
        "entity": entity,
        "patient": entity // 10,
        "times": list(times),
        "variables": [f"v{i}" for i in range(len(times))],
        "values": [float(i) for i in range(len(times))],
        "events": len(times),
        "static": {"Age": age, "Gender": "female", "CareUnit": "MICU"},
        "hospital_death": int(died is not None),
        "death_hours": died,
        "icu_hours": hours,
        "discharge_hours": hours,
        "icd9": [],
        "readmission_days": None,
        "next_icd9": None,
        "care_unit": "MICU",
        "dbsource": "metavision",
        "stays_in_admission": 1,
        "transfers": False,
        "split": "train",
        **other,
    }


def rows(*stays: dict, schema: pa.Schema = SCHEMA) -> pa.Table:
    return pa.Table.from_pylist(list(stays), schema=schema)


def made(task: str, *stays: dict, history: bool = True, **options) -> tuple[list[dict], list[str]]:
    kind = registry.get("cohort", task)
    table, why = cohort.select(kind(kind.options_class(**options)), rows(*stays), history)
    assert all(
        (table["entity"].to_pylist().count(one["entity"]) == 1) == (reason == "")
        for one, reason in zip(stays, why, strict=True)
    )
    return table.to_pylist(), why.tolist()


# ---------------------------------------------------------------- by hand


def test_mortality_has_the_first_48_hours_of_stays_that_last_so_long():
    times = (-3.0, 0.0, 47.99, 48.0, 48.01, 59.0)
    (row,), why = made("mortality", stay(hours=48.0, times=times, died=50.0))
    assert why == [""] and row["label"] == 1
    assert row["times"] == pytest.approx([-3.0, 0.0, 47.99, 48.0])
    assert row["variables"] == ["v0", "v1", "v2", "v3"]
    assert row["values"] == [0.0, 1.0, 2.0, 3.0] and row["events"] == 4
    made_columns = {"label", "sex", "age_band", "care_unit", "dbsource"}
    assert set(row) == {*cohort.KEPT, *made_columns} - {"hospital"}
    (row,), _ = made("mortality", stay(times=times), history=False)
    assert row["times"] == pytest.approx([0.0, 47.99, 48.0])
    assert row["label"] == 0 and row["variables"] == ["v1", "v2", "v3"]
    (row,), _ = made("mortality", stay(hours=30.0, times=(1.0, 25.0)), hours=24)
    assert row["times"] == [1.0]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"hours": 47.999}, "stay shorter than 48 hours"),
        ({"hours": None}, "length of stay unknown"),
        ({"died": 47.9}, "died before the prediction time"),
        ({"times": (48.5, 50.0)}, "no events in the window"),
        ({"times": (-5.0, -1.0)}, "no events in the window"),
        ({"times": ()}, "no events in the window"),
        ({"age": 17.9}, "younger than 18"),
        ({"age": None}, "age unknown"),
        ({"transfers": True}, "moved between ICUs, or not known"),
        ({"stays_in_admission": 2}, "several ICU stays in the admission, or not known"),
        ({"hospital_death": None}, "outcome unknown"),
        ({"hospital_death": 2}, "outcome unknown"),
    ],
)
def test_mortality_leaves_out(changed, reason):
    found, why = made("mortality", stay(1), stay(2, **changed), stay(3))
    assert why == ["", reason, ""] and [row["entity"] for row in found] == [1, 3]


def test_exclusions_of_the_benchmark_can_be_left():
    _, why = made(
        "mortality",
        stay(1, age=17.0),
        stay(2, transfers=True),
        stay(3, stays_in_admission=2),
        stay(4, age=None),
        exclude="none",
    )
    assert why == [""] * 4


def test_mortality_of_physionet_2012_takes_its_own_outcome():
    names = ("entity", "times", "variables", "values", "static")
    schema = pa.schema(
        [
            *(SCHEMA.field(name) for name in names),
            ("in_hospital_death", pa.int64()),
            ("length_of_stay", pa.int64()),
            ("survival", pa.int64()),
        ]
    )
    table = rows(
        {**stay(1), "in_hospital_death": 1, "length_of_stay": -1},
        {**stay(2, age=16.0), "in_hospital_death": 0},
        {**stay(3, times=()), "in_hospital_death": 0},
        schema=schema,
    )
    definition = registry.get("cohort", "mortality")()
    assert definition.needs(table.column_names) == {
        "in_hospital_death": "death in the hospital, the label"
    }
    found, why = cohort.select(definition, table)
    assert why.tolist() == ["", "", "no events in the window"] and found["label"].to_pylist() == [
        1,
        0,
    ]
    assert not {"in_hospital_death", "length_of_stay", "survival"} & {*found.column_names}
    kind = registry.get("cohort", "mortality")
    named = kind(definition.options_class(outcome="In-hospital_death"))
    other = table.rename_columns({"in_hospital_death": "In-hospital_death"})
    assert cohort.select(named, other)[0].equals(found)
    assert set(named.needs(other.column_names)) == {"In-hospital_death"}


def test_stays_that_end_before_the_prediction_time_have_no_other_outcome_either():
    """Their events end with the outcome: --set outcome=icu_death of eICU."""
    table = rows(stay(1), stay(2, hours=20.0, died=20.0), stay(3, hours=60.0, died=47.0))
    death = pa.array([0, 1, 1])
    definition = registry.get("cohort", "mortality")
    definition = definition(definition.options_class(outcome="icu_death"))
    found, why = cohort.select(definition, table.append_column("icu_death", death))
    assert why.tolist() == ["", "stay shorter than 48 hours", "died before the prediction time"]
    assert found["label"].to_pylist() == [0]


def test_decompensation_is_judged_every_hour_from_the_fourth_on():
    (row,), _ = made("decompensation", stay(hours=6.5, times=(0.2, 6.2, 6.4)))
    assert (
        row["label_times"] == [4.0, 5.0, 6.0]
        and row["label_values"] == [0, 0, 0]
        and row["times"] == pytest.approx([0.2])
    )
    (row,), _ = made("decompensation", stay(hours=6.0, times=(0.2, 6.0, 6.4)))
    assert row["label_times"] == [4.0, 5.0, 6.0] and row["times"] == pytest.approx([0.2, 6.0])
    (row,), _ = made("decompensation", stay(hours=6.5), first=5)
    assert row["label_times"] == [5.0, 6.0]


def test_decompensation_looks_less_than_24_hours_ahead():
    (row,), _ = made("decompensation", stay(hours=40.0, died=30.0))
    assert row["label_times"] == [float(t) for t in range(4, 31)], "until death"
    assert row["label_values"] == [0, 0, 0] + [1] * 24, (
        "death just 24 hours after hour 6 is not within 24 hours"
    )
    (row,), _ = made("decompensation", stay(hours=10.0, died=30.5))
    assert row["label_times"] == [float(t) for t in range(4, 11)], (
        "until ICU discharge; death on the ward counts"
    )
    assert row["label_values"] == [0, 0, 0, 1, 1, 1, 1]
    (row,), _ = made("decompensation", stay(hours=10.0, died=30.5), horizon=26.5)
    assert row["label_values"] == [0, 1, 1, 1, 1, 1, 1]


def test_hours_before_the_first_event_are_not_judged():
    (row,), _ = made("decompensation", stay(hours=9.0, times=(-2.0, 6.0, 7.0)))
    assert row["label_times"] == [7.0, 8.0, 9.0] and row["times"] == [-2.0, 6.0, 7.0]
    (row,), _ = made("decompensation", stay(hours=9.0, times=(6.5,)))
    assert row["label_times"] == [7.0, 8.0, 9.0]
    _, why = made(
        "decompensation",
        stay(1, hours=9.0, times=(9.0,)),
        stay(2, hours=3.99),
        stay(3, hours=4.0),
        stay(4, times=(-1.0,)),
        stay(5, died=2.0),
        stay(6, hours=None),
        stay(7, hospital_death=1),
    )
    assert why == [
        "no hour to predict at",
        "no hour to predict at",
        "",
        "no events in the window",
        "no hour to predict at",
        "length of stay unknown",
        "hour of death unknown",
    ]


def test_length_of_stay_counts_days_that_remain_in_ten_buckets():
    (row,), _ = made("length_of_stay", stay(hours=4.0 + 24 * 14 + 1, times=(0.0,)))
    values = dict(zip(row["label_times"], row["label_values"], strict=True))
    assert list(values) == [float(t) for t in range(4, 342)]
    last = 4 + 24 * 14 + 1
    for remaining, bucket in (
        (0, 0),
        (23, 0),
        (24, 1),
        (47, 1),
        (48, 2),
        (24 * 7, 7),
        (24 * 8 - 1, 7),
        (24 * 8, 8),
        (24 * 14 - 1, 8),
        (24 * 14, 9),
        (24 * 14 + 1, 9),
    ):
        assert values[float(last - remaining)] == bucket, remaining


def test_length_of_stay_as_one_label_at_an_hour():
    found, why = made(
        "length_of_stay",
        stay(1, hours=24.0),
        stay(2, hours=47.9, times=(3.0, 24.0, 24.5)),
        stay(3, hours=48.0),
        stay(4, hours=23.9),
        stay(5, hours=24.0 + 24 * 9, times=(25.0,)),
        stay(6, hours=24.0 + 24 * 9, died=24.0 + 24 * 9),
        at=24,
    )
    assert [row["label"] for row in found] == [0, 0, 1, 8] and found[1]["times"] == [3.0, 24.0]
    assert why == ["", "", "", "stay shorter than 24 hours", "no events in the window", ""]
    assert registry.get("cohort", "length_of_stay")().label == "label_values"


def test_phenotypes_are_the_groups_of_the_admissions_codes():
    found, why = made(
        "phenotyping",
        stay(1, icd9=["99591", "42731", "4280", "5849", "0389", "V4511"]),
        stay(2, icd9=[]),
        stay(3, icd9=["428.0 ", "v4511", None, "E8888"]),
        stay(4, icd9=None),
        stay(5, hours=20.0, icd9=["78552"], times=(1.0, 20.0, 20.5)),
        stay(6, hours=None),
    )
    assert [row["labels"] for row in found] == [
        [
            "Acute and unspecified renal failure",
            "Cardiac dysrhythmias",
            "Chronic kidney disease",
            "Congestive heart failure; nonhypertensive",
            "Septicemia (except in labor)",
        ],
        [],
        ["Chronic kidney disease", "Congestive heart failure; nonhypertensive"],
        ["Shock"],
    ]
    assert why == ["", "", "", "codes unknown", "", "length of stay unknown"] and found[3][
        "times"
    ] == [1.0, 20.0]
    found, _ = made("phenotyping", stay(1, icd9=["42731", "5849", "V4511"]), kinds="mixed")
    assert found[0]["labels"] == ["Cardiac dysrhythmias"]


def test_readmission_within_30_days():
    found, why = made(
        "readmission",
        stay(1, readmission_days=30.0),
        stay(2, readmission_days=30.01),
        stay(3),
        stay(4, died=20.0),
        stay(5, readmission_days=-1.0),
        stay(6, hours=20.0, readmission_days=0.0, times=(1.0, 20.5)),
    )
    assert [row["label"] for row in found] == [1, 0, 0, 1] and found[3]["times"] == [1.0]
    assert why == ["", "", "", "died in the hospital", "next admission before discharge", ""]


def test_an_event_at_the_very_end_of_the_stay_is_an_input():
    """Such as a condition that counts from the end of its visit: times are float32, 83.3 is not."""
    assert float(np.float32(83.3)) > 83.3 + cohort.EPS
    (row,), _ = made("readmission", stay(hours=83.3, times=(1.0, 83.3, 83.31)))
    assert row["times"] == pytest.approx([1.0, 83.3])


@pytest.mark.parametrize(
    ("deaths", "labels"),
    [
        ("negative", {1: 0, 2: 0, 3: 0, 4: 1, 5: 0}),
        ("exclude", {1: 0, 3: 0, 4: 1, 5: 0}),
        ("positive", {1: 0, 2: 1, 3: 0, 4: 1, 5: 0}),
    ],
)
@pytest.mark.parametrize("of", ["mimic4", "omop"])
def test_a_death_after_discharge_may_be_left_out_or_count_as_a_readmission(deaths, labels, of):
    """MIMIC-IV has days from discharge to death; OMOP hours of both from the start."""
    days_to_death = {1: None, 2: 30.0, 3: 31.0, 4: 20.0, 5: 400.0}
    days_to_admission = {1: None, 2: None, 3: None, 4: 10.0, 5: 31.0}
    names = ["entity", "times", "variables", "values", "hospital_death", "readmission_days"]
    table = rows(*(stay(i, readmission_days=days) for i, days in days_to_admission.items()))
    days = pa.array(list(days_to_death.values()), pa.float64())
    if of == "mimic4":
        table = table.select([*names, "icu_hours", "death_hours"]).append_column("death_days", days)
    else:
        hours = pa.array([None if one is None else 60 + 24 * one for one in days.to_pylist()])
        table = table.select([*names, "discharge_hours"]).append_column("death_hours", hours)
    kind = registry.get("cohort", "readmission")
    definition = kind(kind.options_class(exclude="none", deaths=deaths))
    assert set(definition.needs(table.column_names)) <= {*table.column_names}
    found, why = cohort.select(definition, table)
    assert dict(zip(*(found[name].to_pylist() for name in ("entity", "label")), strict=True)) == (
        labels
    )
    left_out = ["", "died within 30 days of discharge", "", "", ""]
    assert why.tolist() == (left_out if deaths == "exclude" else [""] * 5)


def test_rows_that_do_not_tell_of_death_after_discharge_are_reported():
    """MIMIC-III has hours of deaths in the hospital alone."""
    kind = registry.get("cohort", "readmission")
    definition = kind(kind.options_class(deaths="exclude"))
    assert "death_days" in definition.needs(SCHEMA.names)
    assert "death_days" not in kind().needs(SCHEMA.names)


def test_codes_of_the_next_visit_are_categories():
    found, why = made(
        "next_codes",
        stay(1, next_icd9=["42731", "427.0 ", "v4511", None, "0389"]),
        stay(2, next_icd9=[]),
        stay(3),
        stay(4, next_icd9=["E888.8", "E8809", "E8801"]),
        stay(5, hours=20.0, next_icd9=["5849"], times=(1.0, 20.5)),
        stay(6, hours=None, next_icd9=["5849"]),
    )
    assert [row["labels"] for row in found] == [["038", "427", "V45"], ["E880", "E888"], ["584"]]
    assert found[2]["times"] == [1.0]
    assert why == [
        "",
        "no next admission with codes",
        "no next admission with codes",
        "",
        "",
        "length of stay unknown",
    ]
    assert not {"next_icd9", "icd9"} & set(found[0])
    assert made("next_codes", stay(1, next_icd9=["42731"]), characters=5)[0][0]["labels"] == [
        "42731"
    ]


def test_phenotypes_are_25_and_no_code_is_of_two():
    text = (Path(phenotyping.__file__).parent / "phenotypes.csv").read_text()
    codes = [code for line in text.splitlines()[3:] for code in line.rpartition(",")[2].split()]
    groups = phenotyping.phenotypes()
    assert len(codes) == len(set(codes)) == len(groups) == 767
    kinds = dict(groups.values())
    assert (
        len(kinds) == 25
        and sorted(kinds.values()).count("acute") == 13
        and sorted(kinds.values()).count("mixed") == 5
    )
    assert {groups[code] for code in ("41071", "25001", "4019", "99859", "51881")} == {
        ("Acute myocardial infarction", "acute"),
        ("Diabetes mellitus without complication", "chronic"),
        ("Essential hypertension", "chronic"),
        ("Complications of surgical procedures or medical care", "acute"),
        ("Respiratory failure; insufficiency; arrest (adult)", "acute"),
    }


def test_subgroups():
    bands = {17.0: "0-17", 18.0: "18-44", 44.9: "18-44", 45.0: "45-64", 64.9: "45-64"}
    bands |= {65.0: "65-79", 79.9: "65-79", 80.0: "80+", 91.4: "80+", None: None}
    found, _ = made("mortality", *(stay(i, age=age) for i, age in enumerate(bands)), exclude="none")
    assert {row["static"]["Age"]: row["age_band"] for row in found} == bands
    assert {(row["sex"], row["care_unit"], row["dbsource"]) for row in found} == {
        ("female", "MICU", "metavision")
    }
    static = [{"Gender": 0.0, "Age": -1.0}, {"Gender": 1.0, "Age": 20.0}, {"Age": 80.0}]
    numbers = pa.table({"static": pa.array([*static, {"Age": 0.0}])})
    assert {name: column.to_pylist() for name, column in cohort.subgroups(numbers).items()} == {
        "sex": ["0", "1", None, None],  # hospitals number them in several ways
        "age_band": [None, "18-44", "80+", "0-17"],
    }


# ---------------------------------------------------------------- against a plain loop


def reference(task: str, one: dict) -> dict | None:
    """The labels of one stay, hour by hour after Harutyunyan et al. 2019; None where it does not
    belong.
    """
    if (
        one["transfers"]
        or one["stays_in_admission"] != 1
        or one["static"]["Age"] is None
        or one["static"]["Age"] < 18
        or one["icu_hours"] is None
    ):
        return None
    length, inside = one["icu_hours"], [t for t in one["times"] if t >= 0]
    lived = one["death_hours"] if one["hospital_death"] else math.inf
    if task == "mortality":
        return (
            {"label": one["hospital_death"], "until": 48}
            if length >= 48 and lived >= 48 and any(t <= 48 for t in inside)
            else None
        )
    if task == "phenotyping":
        names = {
            phenotyping.phenotypes()[code][0]
            for code in one["icd9"]
            if code in phenotyping.phenotypes()
        }
        return (
            {"labels": sorted(names), "until": length} if any(t <= length for t in inside) else None
        )
    if task == "readmission":
        if one["hospital_death"] or not any(t <= length for t in inside):
            return None
        return {
            "label": int(one["readmission_days"] is not None and one["readmission_days"] <= 30),
            "until": length,
        }
    end = min(length, lived) if task == "decompensation" else length
    hours = [t for t in range(4, 2000) if t <= end and inside and t > inside[0]]
    if not hours:
        return None
    values = (
        [int(lived - t < 24) for t in hours]
        if task == "decompensation"
        else [
            next(
                (i for i, top in enumerate((1, 2, 3, 4, 5, 6, 7, 8, 14)) if length - t < 24 * top),
                9,
            )
            for t in hours
        ]
    )
    return {"label_times": [float(t) for t in hours], "label_values": values, "until": hours[-1]}


def drawn(count: int) -> list[dict]:
    """Stays with all that may happen, on a grid of quarters of an hour, so that bounds are met."""
    draw, codes = (
        np.random.default_rng(0),
        [*list(phenotyping.phenotypes())[::40], "99999", "E8888"],
    )
    out = []
    for i in range(count):
        hours = (
            float(draw.choice([2, 4, 5, 24, 47.75, 48, 48.25, 100, 300, 500]))
            if draw.random() < 0.9
            else None
        )
        times = (
            np.sort(draw.integers(-20, 60 * 4, draw.integers(0, 12)) / 4).tolist()
            if draw.random() < 0.9
            else [float(draw.integers(1, 9))]
        )
        died = float(draw.integers(1, 4 * 120)) / 4 if draw.random() < 0.4 else None
        out.append(
            stay(
                i,
                hours,
                times,
                died,
                age=None if draw.random() < 0.05 else float(draw.choice([17, 18, 60])),
                transfers=bool(draw.random() < 0.1),
                stays_in_admission=int(draw.choice([1, 1, 1, 1, 2])),
                icd9=draw.choice(codes, draw.integers(0, 6)).tolist(),
                readmission_days=float(draw.choice([0.5, 30, 30.5, 300]))
                if draw.random() < 0.5
                else None,
                next_icd9=codes[i % 5 : i % 5 + i % 4] if i % 2 else None,
            )
        )
    return out


@pytest.mark.parametrize(
    "task", ["mortality", "decompensation", "length_of_stay", "phenotyping", "readmission"]
)
def test_labels_are_those_of_a_plain_loop(task):
    stays = drawn(600)
    found = {row["entity"]: row for row in made(task, *stays)[0]}
    wanted = {one["entity"]: label for one in stays if (label := reference(task, one))}
    assert found.keys() == wanted.keys() and 100 < len(found) < 500
    for one in stays:
        if one["entity"] in wanted:
            label, row = wanted[one["entity"]], found[one["entity"]]
            until = label.pop("until")
            shown = [
                (t, name)
                for t, name in zip(one["times"], one["variables"], strict=True)
                if t <= until
            ]
            assert {name: row[name] for name in label} == label
            assert list(zip(row["times"], row["variables"], strict=True)) == shown and row[
                "events"
            ] == len(shown) == len(row["values"])


@pytest.mark.parametrize("task", registry.names("cohort"))
def test_batches_and_slices_change_nothing_and_types_hold_without_rows(task):
    stays, definition = drawn(60), registry.get("cohort", task)()
    whole, why = cohort.select(definition, rows(*stays))
    parts = [cohort.select(definition, rows(*stays).slice(i, 7)) for i in range(0, 60, 7)]
    assert pa.concat_tables([table for table, _ in parts]).equals(whole)
    assert np.concatenate([reasons for _, reasons in parts]).tolist() == why.tolist()
    assert cohort.select(definition, SCHEMA.empty_table())[0].schema == whole.schema
    outcomes = {*SCHEMA.names} - {*cohort.KEPT, "care_unit", "dbsource"}
    assert len(outcomes) == 9 and not outcomes & {*whole.column_names}
    assert definition.label in whole.column_names
    assert set(definition.needs(SCHEMA.names)) <= set(cohort.names_of(SCHEMA))


@pytest.mark.parametrize("task", registry.names("cohort"))
def test_the_future_is_not_seen(task):
    """Other events behind each window, in another number and order, give the same bytes."""
    stays, definition, draw = drawn(80), registry.get("cohort", task)(), np.random.default_rng(1)
    kept, why = cohort.select(definition, rows(*stays))
    window = definition.window(rows(*stays))
    others = []
    for one, end, reason in zip(stays, window, why, strict=True):
        if reason == "":
            seen = sum(time <= end for time in one["times"])
            later = (end + draw.integers(1, 99, 5)).tolist()
            one = {
                **one,
                "times": one["times"][:seen] + later,
                "variables": one["variables"][:seen] + ["secret"] * 5,
                "values": one["values"][:seen] + draw.normal(size=5).tolist(),
            }
        others.append(one)
    sinks = [pa.BufferOutputStream(), pa.BufferOutputStream()]
    for table, sink in zip((kept, cohort.select(definition, rows(*others))[0]), sinks, strict=True):
        pq.write_table(table, sink)
    assert len(kept) > 10 and sinks[0].getvalue().equals(sinks[1].getvalue())


def test_rows_that_are_no_event_rows_are_reported():
    nan = {**stay(1), "times": [0.0, math.nan, 1.0]}
    short, none, nobody = (
        {**stay(2), "values": [1.0]},
        {**stay(3), "times": None},
        {**stay(4), "entity": None},
    )
    assert cohort.invalid_row_reasons(rows(stay(5), nan, short, none, nobody)).tolist() == [
        "",
        "a time that is no number",
        "times, variables and values of different lengths",
        "no times, variables or values",
        "no entity",
    ]


class Careless(cohort.CohortDefinition):
    registered_name, options_class = "careless", registry.Options

    def needs(self, names):
        return {}

    def include(self, table):
        return cohort.reasons(len(table))

    def window(self, table):
        return cohort.numbers(table, "icu_hours")

    def labels(self, table):
        return {"label": pa.array([None] * len(table))}


@pytest.mark.parametrize(
    ("hours", "said"),
    [
        (None, "careless gives no window for rows that it includes"),
        (60.0, "its column label is null of 1 rows"),
    ],
)
def test_a_definition_with_a_gap_is_reported(hours, said):
    with pytest.raises(ValueError, match=said):
        cohort.select(Careless(), rows(stay(hours=hours)))


def test_texts_are_no_numbers():
    with pytest.raises(ValueError, match="column icu_hours is string, no number"):
        cohort.numbers(pa.table({"icu_hours": ["long"]}), "icu_hours")
    assert cohort.numbers(pa.table({"a": [True, None, False]}), "a").tolist()[::2] == [1.0, 0.0]
    assert json.dumps(cohort.numbers(pa.table({"a": [True, None]}), "a").tolist()) == "[1.0, NaN]"
