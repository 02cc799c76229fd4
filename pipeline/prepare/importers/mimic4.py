"""MIMIC-IV's tables: one row an intensive care stay, with all events up to its end."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.prepare.clinical.mimic_events import MimicImporter
from pipeline.prepare.clinical.mimic_stays import MIMIC4


class Mimic4Options(Options):
    drugs: bool = Field(True, description="false: no events of prescriptions")
    inputs: bool = Field(True, description="false: no events of inputevents")


@register("importer", "mimic4", options=Mimic4Options)
class Mimic4(MimicImporter):
    """MIMIC-IV: stays in intensive care as events.

    MIMIC-IV's folder (2.0 and later): hosp/ with patients, admissions, labevents, and if present
    prescriptions, diagnoses_icd; icu/ with icustays, chartevents, and if present outputevents,
    inputevents, d_items (.csv, .csv.gz or .parquet). Other tables are not read.

    It was tried on the demo of MIMIC-III, written as MIMIC-IV is published, and on the stays,
    diagnoses, prescriptions and outputs of MIMIC-IV's own demo (2.2), not on MIMIC-IV itself.

    Columns and rules are those of `mimic3`, with these differences:

    - entity is stay_id. MIMIC-IV has no Source and no dbsource.
    - Age counts from anchor_age by the year of the admission. Whoever was above 89 in anchor_year
      is 91 then.
    - CareUnit and care_unit are short where a name has a short form: Medical Intensive Care Unit
      (MICU) is MICU, as in MIMIC-III, and Cardiac Vascular Intensive Care Unit (CVICU) is CSRU.
    - AdmissionType is EMERGENCY for EW EMER. and DIRECT EMER. The other types stay as they are, and
      MIMIC-III has only ELECTIVE and URGENT of them, not SURGICAL SAME DAY ADMISSION and not those
      of observation (EU OBSERVATION, OBSERVATION ADMIT, ...).
    - Codes stand in columns by their version: icd9, icd10, next_icd9, next_icd10, and in static
      previous_codes (ICD-9, as in MIMIC-III) and previous_icd10. The outcomes are null where the
      admission has no codes of that version.
    - death_hours is that of deathtime, in hospital alone. death_days counts days from the day of
      discharge to the day of death (dod), which is known up to a year after the last discharge.
    - A drug counts from its starttime, which is a time of day.
    - A laboratory value counts from its storetime, when its result was there, if that is later than
      its charttime. So do the results of the laboratory in chartevents (glucose of serum and of
      whole blood, pH, arterial oxygen saturation); other values of chartevents count from their
      charttime. How many laboratory values have no storetime is in the notes of the summary.
    - A laboratory value without a hadm_id belongs to the stay of its patient whose interval, from
      admission to hospital to the end of intensive care, holds that time; if there is none, it is
      left out and counted.
    """

    data_set = MIMIC4
