"""How much is read to look for test rows among others: of rows that name files, the files."""

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data import manifest
from pipeline.transfer import overlap


def test_rows_that_name_files_count_as_the_files(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.wav").write_bytes(bytes(1000 + i % 2 * 1000))
    paths = [*(str(tmp_path / f"{i}.wav") for i in range(40)), str(tmp_path / "gone.wav"), None]

    def rows(values: list, kind: pa.DataType) -> manifest.Selection:
        pq.write_table(pa.table({"sound": pa.array(values, kind)}), tmp_path / "rows.parquet")
        return manifest.Selection(manifest.build(str(tmp_path / "rows.parquet"), "auto", str(tmp_path)))

    assert 1000 * 42 < overlap._bytes(rows(paths, pa.string()), "audio", {"audio": "sound"}) < 2000 * 42
    assert overlap._bytes(rows(paths[-1:], pa.string()), "image", {"image": "sound"}) == 0
    held = rows([b"abc"] * 42, pa.binary())
    assert overlap._bytes(held, "audio", {"audio": "sound"}) == held.manifest.size
    texts = rows(["a text"] * 42, pa.string())
    assert overlap._bytes(texts, "text", {"text": "sound"}) == texts.manifest.size
