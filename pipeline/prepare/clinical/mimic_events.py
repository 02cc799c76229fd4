"""The tables of events of MIMIC-III and MIMIC-IV, and the base class of their importers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import dictionary_codes, filled
from pipeline.prepare.clinical import mimic_stays, plausible
from pipeline.prepare.engine.grouped import (
    Entities,
    EventReader,
    Events,
    EventTables,
    GroupedImporter,
    variable_codes,
)
from pipeline.prepare.engine.records import index_in_sorted
from pipeline.prepare.readers.archives import Opener, listing
from pipeline.prepare.readers.csv_blocks import (
    Column,
    check_zones,
    epoch_times,
    read_table,
    split_table,
)

MEASURED = ("chartevents", "labevents", "outputevents")
CHARTED_RESULTS = (220227, 220274, 220621, 223830, 226537)
"""Items of CHARTEVENTS that are results of the laboratory: their charttime is when the blood was
drawn (github.com/MIT-LCP/mimic-code, issue 375). Of the others charttime is when they were known.
"""
GIVEN = ("inputevents", "inputevents_cv", "inputevents_mv")
CONVERSIONS = ("", "first", "second", "refill", "present", *plausible.CONVERSIONS)
PAIRS = (CONVERSIONS.index("first"), CONVERSIONS.index("second"))
UNITS = {
    "volume": {"ml": 1.0, "cc": 1.0, "l": 1000.0, "liter": 1000.0, "liters": 1000.0},
    "mass": {"mg": 1.0, "mcg": 0.001, "ug": 0.001}
    | dict.fromkeys(("g", "gm", "gms", "gram", "grams"), 1000.0),
    "units": dict.fromkeys(("units", "unit", "u", "iu"), 1.0),
    "equivalents": {"meq": 1.0},
    "substance": {"mmol": 1.0},
    "doses": {"dose": 1.0, "doses": 1.0},
    "energy": {"cal": 1.0, "kcal": 1.0},
}
AMOUNTS = {unit: (kind, one[unit]) for kind, one in UNITS.items() for unit in one}
"""Units of an amount (as `plausible.plain_unit` writes them): the kind of quantity, and the factor
to mL, mg or the kind's one unit. In MIMIC Cal means kilocalories.
"""
AMOUNT_KINDS = sorted({kind for kind, _ in AMOUNTS.values()})
UNKNOWN_AMOUNT = "amount in an unknown unit"
OTHER_AMOUNT = "amount in a unit that measures something else than its item's in D_ITEMS"
CANCELLED = ("rewritten",)
PARTS_OF_GCS = ("GCS_eye", "GCS_motor", "GCS_verbal")
DAY, WIDTH = 86400, 34
"""Seconds of a day; number of bits that hold the seconds of all years."""
NO_ITEM = "no item id"
UNKNOWN = "unknown item"
NO_STAY = "no stay"
OUTSIDE = "outside the stay"
NO_TIME = "no time"
NO_RESULT_TIME = "laboratory values without a storetime, taken at their charttime"


class Item(NamedTuple):
    """An item of a table: its id, and what clinical/items.csv says of it."""

    id: int
    variable: str
    unit: str
    conversion: str


class MimicImporter(GroupedImporter):
    """Base class: one row an intensive care stay, with all events up to its end. Examples:
    `mimic3`, `mimic4`.

    Options: `drugs` and `inputs`, whether those events are read.
    """

    data_set: ClassVar[mimic_stays.DataSet]
    label = "hospital_death"
    kept_reasons = (NO_RESULT_TIME,)

    def sources(self, source: str, cut_bytes: int) -> EventTables:
        found = listing(source)
        self.tables = mimic_stays.find_tables(self.data_set, found, source)
        wanted = (
            *MEASURED,
            *(GIVEN if self.options.inputs else ()),
            *(("prescriptions",) if self.options.drugs else ()),
        )
        out = [
            [part]
            for name in wanted
            for entry in self.tables.get(name, ())
            for part in split_table(name, entry, cut_bytes)
        ]
        absent = mimic_stays.missing_tables(self.data_set, self.tables)
        return EventTables(
            out,
            f"{found.fingerprint} {plausible.fingerprint()}",
            {"tables that are not there": absent} if absent else {},
        )

    def entities(self, source: str) -> Entities:
        found = mimic_stays.read_stays(self.data_set, self.tables)
        keys = {
            "by_admission": _Intervals(found.admissions, found.times),
            "items": self._items(),
            "by_patient": _Intervals(
                found.rows["patient"].combine_chunks().to_numpy(), found.times
            ),
            "labels": self._labels(),
            "zoned": found.zoned,
            "stays_table": self.tables["icustays"][0].name,
        }
        info = {
            "time": "hours since admission to intensive care",
            "static": [field.name for field in self.data_set.facts],
            "outcomes": [field.name for field in self.data_set.outcomes],
            "units": plausible.units(),
        }
        return Entities(found.rows, keys, "patient", found.invalid, found.notes, info)

    def _items(self) -> dict[str, list[Item]]:
        """Return the items of clinical/items.csv by table, sorted by their ids."""
        tables: dict[str, list[Item]] = {}
        for row in plausible.rows_of("items.csv"):
            item = Item(int(row["itemid"]), row["variable"], row["unit"], row["conversion"])
            tables.setdefault(row["table"], []).append(item)
        return {table: sorted(items) for table, items in tables.items()}

    def _labels(self) -> tuple[np.ndarray, list[str], np.ndarray, np.ndarray]:
        """Read D_ITEMS: (sorted item ids, their labels, factors and kinds as of `_amount_unit`)."""
        if "d_items" not in self.tables or not self.options.inputs:
            none = np.empty(0, dtype=np.int64)
            return none, [], np.empty(0), none
        columns = {
            "itemid": Column("id"),
            "label": Column("text"),
            "unitname": Column("text", False),
        }
        with Opener() as opener:
            table = read_table("d_items", self.tables["d_items"][0], columns, opener)
        labels: dict[int, str] = {}
        units: dict[int, tuple[float, int]] = {}
        for row in table.select(list(columns)).to_pylist():
            label = " ".join((row["label"] or "").split())
            if row["itemid"] is not None and label:
                labels[row["itemid"]] = label
                units[row["itemid"]] = _amount_unit(row["unitname"])
        items = sorted(labels)
        return (
            np.array(items, dtype=np.int64),
            [labels[item] for item in items],
            np.array([units[item][0] for item in items], dtype=np.float64),
            np.array([units[item][1] for item in items], dtype=np.int64),
        )

    # ---------------------------------------------------------------- events

    def events(self, reader: EventReader) -> Iterator[Events]:
        stay_reader = _StayReader(
            reader.input_split, reader.opener, reader.keys, reader.tally, reader.dropped
        )
        if stay_reader.table in MEASURED:
            return self._measured(stay_reader)
        if stay_reader.table == "prescriptions":
            return self._drugs(stay_reader)
        return self._inputs(stay_reader)

    def _measured(self, reader: _StayReader) -> Iterator[Events]:
        columns = {
            **reader.ids,
            "itemid": Column("id"),
            "charttime": Column("time"),
            "valuenum": Column("number", False),
            "value": Column("text", False),
            "valueuom": Column("text", False),
            "error": Column("id", False),
            "iserror": Column("id", False),
        }
        known_at = self.data_set.result_time
        if known_at and reader.table != "outputevents":
            columns[known_at] = Column("time", reader.table == "labevents")
        known = reader.keys["items"][reader.table]
        items = np.array([item.id for item in known])
        names = sorted({item.variable for item in known})
        codes = np.array([names.index(item.variable) for item in known])
        conversions = np.array([CONVERSIONS.index(item.conversion) for item in known])
        ranges, units = plausible.Ranges(), plausible.Units()
        for batch in reader.batches(columns):
            reader.begin(len(batch))
            item = filled(batch["itemid"], -1)
            at = index_in_sorted(items, item)
            reader.drop(NO_ITEM, item < 0)
            reader.drop(UNKNOWN, at < 0)
            reader.drop(
                "marked as an error",
                (filled(batch["error"], -1) == 1) | (filled(batch["iserror"], -1) == 1),
            )
            batch, at = reader.keep(batch), at[reader.good]  # the most rows of CHARTEVENTS end here
            time, has_no_result_time = self._times(reader.table, batch, items[at])
            rows, hours = reader.assign_stays(batch, time)
            batch, at = batch.filter(pa.array(reader.good)), at[reader.good]
            has_no_result_time = has_no_result_time[reader.good]
            numbers = _values(batch, conversions[at])
            factors = _factors(units, batch["valueuom"], at, known)
            reader.begin(len(batch))
            plausible.drop_unusable(reader, numbers, factors, codes[at], names)
            at_charttime = reader.good & has_no_result_time
            reader.dropped[NO_RESULT_TIME] += int(np.count_nonzero(at_charttime))
            rows, hours, at, values = (
                column[reader.good] for column in (rows, hours, at, numbers.values * factors)
            )
            values = plausible.converted(values, conversions[at], CONVERSIONS)
            values, good = ranges.apply(values, codes[at], names, reader.dropped, reader.table)
            yield Events(rows, hours, codes[at], names, values).filter(good)

    def _times(
        self,
        table: str,
        batch: pa.Table,
        items: np.ndarray,
    ) -> tuple[Any, np.ndarray]:
        """Return (the times at which values were known; (n,) bool, which of them are laboratory
        values without a time of their result).

        `items`: (n,) the item ids of the rows.
        """
        time, known_at = batch["charttime"], self.data_set.result_time
        if not known_at or table == "outputevents":
            return time, np.zeros(len(batch), dtype=bool)
        is_result = np.isin(items, CHARTED_RESULTS) | (table == "labevents")
        later = pc.max_element_wise(time, batch[known_at])
        has_no_time = batch[known_at].is_null().to_numpy()
        return pc.if_else(pa.array(is_result), later, time), is_result & has_no_time

    def _drugs(self, reader: _StayReader) -> Iterator[Events]:
        start = self.data_set.drug_time
        columns = {**reader.ids, start: Column("time"), "drug": Column("text")}
        for batch in reader.batches(columns):
            spaced = pc.replace_substring_regex(batch["drug"].combine_chunks(), r"\s+", " ")
            names, codes = variable_codes(pc.utf8_trim_whitespace(spaced), "drug: ")
            reader.begin(len(batch))
            reader.drop("no drug", codes < 0)
            batch, codes = reader.keep(batch), codes[reader.good]
            whole_days = self.data_set.has_drug_days
            rows, hours = reader.assign_stays(batch, batch[start], whole_days)
            yield Events(rows, hours, codes[reader.good], names, np.ones(len(rows)))

    def _inputs(self, reader: _StayReader) -> Iterator[Events]:
        """Yield what was given: an amount counts at its end, when all of it was given."""
        columns = {
            **reader.ids,
            "itemid": Column("id"),
            "charttime": Column("time", False),
            "endtime": Column("time", False),
            "amount": Column("number"),
            "amountuom": Column("text", False),
            "statusdescription": Column("text", False),
        }
        items, labels, item_factors, item_kinds = reader.keys["labels"]
        names = [f"input: {label}" for label in labels]
        for batch in reader.batches(columns):
            reader.begin(len(batch))
            item = filled(batch["itemid"], -1)
            at = index_in_sorted(items, item)
            reader.drop(NO_ITEM, item < 0)
            reader.drop(UNKNOWN, at < 0)
            status = pc.utf8_lower(batch["statusdescription"].combine_chunks())
            reader.drop("rewritten", np.asarray(pc.is_in(status, value_set=pa.array(CANCELLED))))
            amount = plausible.numbers(batch["amount"])
            reader.drop_by_code(plausible.REASONS, amount.reasons)
            reader.drop(plausible.OUT_OF_RANGE, amount.values <= 0)
            factors, kinds = _amount_units(batch["amountuom"], np.append(item_factors, 1.0)[at])
            of_item = np.append(item_kinds, -1)[at]
            reader.drop(UNKNOWN_AMOUNT, np.isnan(factors))
            reader.drop(OTHER_AMOUNT, (kinds >= 0) & (of_item >= 0) & (kinds != of_item))
            values = amount.values * factors
            batch, at, values = reader.keep(batch), at[reader.good], values[reader.good]
            time = pc.coalesce(batch["charttime"], batch["endtime"])
            rows, hours = reader.assign_stays(batch, time)
            yield Events(rows, hours, at[reader.good], names, values[reader.good])

    def derived(
        self,
        rows: np.ndarray,
        hours: np.ndarray,
        codes: np.ndarray,
        values: np.ndarray,
        names: list[str],
    ) -> Events | None:
        """Add the sum of the three scores of the Glasgow Coma Scale: MetaVision has none.

        All three must be there at a time, without a sum. Of several scores of a kind the lowest
        counts.
        """
        if not set(PARTS_OF_GCS) <= set(names):
            return None
        has_changed = (np.diff(rows) != 0) | (np.diff(hours) != 0)
        is_new = np.append(True, has_changed)[: len(rows)]
        moments, moment = np.flatnonzero(is_new), np.cumsum(is_new) - 1
        total, count = np.zeros(len(moments)), np.zeros(len(moments), dtype=np.int64)
        for name in PARTS_OF_GCS:
            here = codes == names.index(name)
            own, first = np.unique(moment[here], return_index=True)
            total[own] += values[here][first]
            count[own] += 1
        if "GCS" in names:
            count[moment[codes == names.index("GCS")]] = 0
        found = np.flatnonzero(count == len(PARTS_OF_GCS))
        return Events(
            rows[moments[found]],
            hours[moments[found]],
            np.zeros(len(found), dtype=np.int64),
            ["GCS"],
            total[found],
        )


class _Intervals:
    """Finds the stay at a time among those of one admission or patient.

    It is the first that ends at the time or later, if its hospital admission was before.
    """

    def __init__(self, keys: np.ndarray, times: np.ndarray):
        self.known = np.unique(keys)
        self.base = int(times.min(initial=1 << 40)) - (200 * 366 * DAY if len(times) else 0)
        packed = (np.searchsorted(self.known, keys) << WIDTH) + (times[:, 2] - self.base)
        self.order = np.argsort(packed, kind="stable")
        self.packed, self.times, self.keys = packed[self.order], times, keys

    def find(self, keys: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return ((n,) index of the stay, or -1; (n,) whether there is any stay under the key)."""
        if not len(self.known):
            return np.full(len(keys), -1), np.zeros(len(keys), dtype=bool)
        at = index_in_sorted(self.known, keys)
        is_known = at >= 0
        since = np.clip(seconds - self.base, 0, (1 << WIDTH) - 1)
        index = np.searchsorted(self.packed, (at << WIDTH) + since)
        stay = self.order[np.minimum(index, len(self.order) - 1)]
        inside = (
            is_known
            & (index < len(self.order))
            & (self.keys[stay] == keys)
            & (seconds >= self.times[stay, 0])
        )
        return np.where(inside, stay, -1), is_known


class _StayReader(EventReader):
    """Reads a table whose rows are assigned to stays."""

    @property
    def ids(self) -> dict[str, Column]:
        # only LABEVENTS has rows without an admission
        may_lack_admissions = self.table == "labevents"
        return {"subject_id": Column("id"), "hadm_id": Column("id", not may_lack_admissions)}

    def batches(self, columns: dict[str, Column]) -> Iterator[pa.Table]:
        """Yield the rows as `csv_blocks.batches` does.

        Raises ValueError where the times of the rows or of the stays have a zone and the others
        none.
        """
        for batch in super().batches(columns):
            name, zoned = self.input_split.entry.name, self.tally.zoned
            check_zones(name, zoned, self.keys["stays_table"], self.keys["zoned"])
            yield batch

    def keep(self, batch: pa.Table) -> pa.Table:
        return batch.filter(pa.array(self.good))

    def assign_stays(
        self,
        batch: pa.Table,
        column: Any,
        whole_days: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Assign rows to stays, by the admission that a row names, else by its patient.

        Args:
            batch: the rows.
            column: their times.
            whole_days: a time of 00:00 is a day and counts from its end; if times have zones every
                time is a day, since 00:00 is another time in UTC.

        Returns:
            (index of the stay, hours since its start) of the rows that have one; `good` is then
                theirs.
        """
        seconds, timed = epoch_times(column)
        if whole_days:
            is_day = (seconds % DAY == 0) | (True in self.keys["zoned"])
            seconds = np.where(is_day, seconds + DAY, seconds)
        admission, patient = filled(batch["hadm_id"], -1), filled(batch["subject_id"], -1)
        stay, has_stay = self.keys["by_admission"].find(admission, seconds)
        by_patient, patient_has_stay = self.keys["by_patient"].find(patient, seconds)
        named = admission >= 0
        stay = np.where(named, stay, by_patient)
        has_stay = np.where(named, has_stay, patient_has_stay)
        self.begin(len(seconds))
        self.drop(NO_TIME, ~timed)
        self.drop(NO_STAY, ~has_stay)
        self.drop(OUTSIDE, stay < 0)
        stay, seconds = stay[self.good], seconds[self.good]
        return stay, (seconds - self.keys["by_admission"].times[stay, 1]) / 3600


def _factors(
    units: plausible.Units, written: Any, places: np.ndarray, items: list[Item]
) -> np.ndarray:
    """Return (n,) factors of values by their units (VALUEUOM), NaN for unknown ones.

    Args:
        units: those that are known.
        written: (n,) the units' texts.
        places: (n,) indices in `items`.
        items: those of the table.
    """
    codes, dictionary = dictionary_codes(written)
    texts = ["", *dictionary.to_pylist()]  # code -1, no unit, is the first one
    pairs = (codes.astype(np.int64) + 1) * len(items) + places
    distinct, which = np.unique(pairs, return_inverse=True)
    factors: list[float] = []
    for pair in distinct.tolist():
        code, place = divmod(pair, len(items))
        _, variable, unit, conversion = items[place]
        factors.append(units.factor(texts[code], variable, unit, conversion))
    return np.array(factors, dtype=np.float64)[which]


def _amount_unit(unit: str | None) -> tuple[float, int]:
    """Return (factor of a unit in AMOUNTS, index of its kind in AMOUNT_KINDS).

    No unit has the factor 1 and the kind -1; an unknown one has the factor NaN.
    """
    plain = plausible.plain_unit(unit or "")
    if not plain:
        return 1.0, -1
    kind, factor = AMOUNTS.get(plain, ("", np.nan))
    return factor, AMOUNT_KINDS.index(kind) if kind else -1


def _amount_units(written: Any, item_factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ((n,) factors and (n,) kinds of amounts by their unit, as `_amount_unit`).

    Args:
        written: the units.
        item_factors: (n,) those of the items' own units, which count where an amount has none.
    """
    codes, dictionary = dictionary_codes(written)
    texts = [*dictionary.to_pylist(), None]  # code -1 is the last one
    factors, kinds = map(np.array, zip(*map(_amount_unit, texts), strict=True))
    has_unit = np.array([bool(plausible.plain_unit(text or "")) for text in texts])
    return np.where(has_unit[codes], factors[codes], item_factors), kinds[codes]


def _values(batch: pa.Table, conversions: np.ndarray) -> plausible.Numbers:
    """Return the numbers of rows: VALUENUM, or where it is null what VALUE says."""
    pair = np.select(
        [conversions == PAIRS[0], conversions == PAIRS[1]],
        [1, 2],
        0,
    )
    number, text = plausible.numbers(batch["valuenum"]), plausible.numbers(batch["value"], pair)
    stands = number.reasons == 0
    values = np.where(stands, number.values, text.values)
    censored = np.where(stands, number.censored, text.censored)
    reasons = np.where(text.reasons == 1, number.reasons, text.reasons)
    reasons = np.where(stands, 0, reasons).astype(np.int8)
    written = batch["value"].combine_chunks()
    for name, convert in (("refill", _refill), ("present", _present)):
        here = conversions == CONVERSIONS.index(name)
        if here.any():
            found = convert(written)
            values = np.where(here, found, values)
            own_reasons = np.where(np.isnan(found), 2, 0)
            reasons = np.where(here, own_reasons, reasons).astype(np.int8)
    return plausible.Numbers(values, reasons, censored)


def _refill(text: Any) -> np.ndarray:
    """Return 1 where it takes longer than 3 s, else 0 (as in Harutyunyan et al. 2019)."""
    slow, fast = (
        np.asarray(pc.match_substring_regex(text, f"(?i)^\\s*({words})").fill_null(False))
        for words in ("abnormal|delayed", "normal|brisk")
    )
    return np.select([slow, fast], [1.0, 0.0], np.nan)


def _present(text: Any) -> np.ndarray:
    """Return 1 where the setting of a ventilator shows that it is on."""
    off = np.asarray(
        pc.match_substring_regex(text, r"(?i)^\s*(standby|other/remarks|)\s*$").fill_null(True)
    )
    return np.where(off, np.nan, 1.0)
