"""MIMIC-III's tables: one row an intensive care stay, with all events up to its end."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.prepare.clinical.mimic_events import MimicImporter
from pipeline.prepare.clinical.mimic_stays import MIMIC3


class Mimic3Options(Options):
    drugs: bool = Field(True, description="false: no events of PRESCRIPTIONS")
    inputs: bool = Field(True, description="false: no events of INPUTEVENTS")


@register("importer", "mimic3", options=Mimic3Options)
class Mimic3(MimicImporter):
    """MIMIC-III: stays in intensive care as events.

    It reads MIMIC-III's folder: PATIENTS, ADMISSIONS, ICUSTAYS, CHARTEVENTS, LABEVENTS, and if
    present OUTPUTEVENTS, INPUTEVENTS_CV and _MV, PRESCRIPTIONS, DIAGNOSES_ICD, D_ITEMS (.csv,
    .csv.gz or .parquet; names, headers and columns in any case and order).

    Columns:

    - entity (icustay_id), patient (subject_id)
    - times (hours since admission to intensive care), variables, values, events
    - static: Age, Gender, CareUnit, Source, AdmissionType, previous_codes
    - the outcomes hospital_death, death_hours, icu_hours, discharge_hours, icd9, readmission_days,
      next_icd9 (of the patient's next admission), care_unit, dbsource, stays_in_admission,
      transfers

    Rules:

    - An event belongs to the first stay of its admission that ends after it.
    - Items are named by clinical/items.csv (CareVue and MetaVision alike), values checked by
      clinical/ranges.csv, and units (VALUEUOM) converted by clinical/units.csv. Values in unknown
      units are left out and counted under their variable.
    - Drugs are called drug: NAME, inputs input: NAME, with amounts in mL, mg, units, mEq, mmol,
      doses or kcal. An amount in another unit, or in one that measures another quantity than the
      item's in D_ITEMS (UNITNAME), is left out and counted.
    - A date without a time of day counts from the day's end, an infusion from its end: nothing is
      known earlier. Times have zones in all tables or in none.
    - Laboratory values count from their charttime, when the sample was taken, as in Harutyunyan et
      al. 2019: MIMIC-III does not tell when the result was there (MIMIC-IV does).
    - All rows are train: cut by patient.
    """

    data_set = MIMIC3
