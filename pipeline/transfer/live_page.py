"""A page that shows a job while it runs: trials done of all, values so far, curves.

A thread of the run serves it until the run ends, to all users of this machine and to no other. Its
content is read from the records and logs of the trials when a browser asks for the page, so that it
costs nothing while nobody looks.
"""

from __future__ import annotations

import html
import json
import math
import secrets
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.io import storage
from pipeline.io.wording import plural
from pipeline.report import blocks, plots, results
from pipeline.report.blocks import Block, Details, Figure, Heading, KeyFigures, Table, Text, Value
from pipeline.report.matrix import FAILED, WINS
from pipeline.report.results import ResultRow
from pipeline.report.trial_record import TrialRecord
from pipeline.train.progress import Progress
from pipeline.transfer import trial
from pipeline.transfer.grid import Trial, folders, fraction_text
from pipeline.transfer.job_state import JobState

HOST = "127.0.0.1"
REPORT = "/report.html"
RENEW_SECONDS = 5
MAX_LINES = 8
"""Most lines of a chart: the page has this number of colours."""
MAX_POINTS = 200
MAX_RUNNING = 20

Points = list[tuple[float, float]]

_SCRIPT = """
const renew = async () => {
  try {
    const answer = await fetch(location.href);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const open = [...document.querySelectorAll("details")].map(one => one.open);
    document.querySelector("main").replaceWith(page.querySelector("main"));
    document.querySelectorAll("details").forEach((one, i) => one.open = open[i] ?? one.open);
  } catch {
    document.querySelector("h1").textContent = document.body.dataset.ended;
    document.querySelector(".lead")?.remove();
  }
  setTimeout(renew, 1000 * SECONDS);
};
setTimeout(renew, 1000 * SECONDS);
"""


@contextmanager
def serve(state: JobState, port: int | None) -> Iterator[None]:
    """Serve the page of a run until the block ends.

    Args:
        port: A port of 127.0.0.1; 0: any free one. None: nothing is served.

    Raises:
        ValueError: The port cannot be used.
    """
    if port is None:
        yield
        return
    page = LivePage(state.job.name, state.job.root, state.progress, _logs_of_sources(state))
    try:
        server = _Server((HOST, port), page)
    except (OSError, OverflowError) as error:  # OverflowError: beyond all ports
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"--serve {port}: cannot listen on {HOST}:{port} ({reason}); give another port, or 0 "
            "for any free one"
        ) from None
    thread = threading.Thread(
        target=server.serve_forever,
        kwargs={"poll_interval": 0.05},  # seconds that the end of a run may wait for it
        name="live page",
        daemon=True,
    )
    thread.start()
    state.progress.note(f"live page, until the run ends: http://{HOST}:{server.server_port}/")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def _logs_of_sources(state: JobState) -> dict[str, str]:
    """Return the URI of the training log of each source that is trained."""
    return {
        name: storage.join(stage.uri, "log", "metrics.jsonl")
        for name, stage in state.sources.items()
        if stage.splits is not None
    }


# ---------------------------------------------------------------- the server


class _Server(ThreadingHTTPServer):
    def __init__(self, address: tuple[str, int], page: LivePage):
        super().__init__(address, _Handler)
        self.page = page


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        # a page of another site whose name leads here has that name in its requests
        name = self.headers.get("Host", "").partition(":")[0]
        if name not in (HOST, "localhost"):
            self._answer(
                HTTPStatus.FORBIDDEN, b"only requests from this machine (127.0.0.1) are answered\n"
            )
            return
        nonce = secrets.token_urlsafe(16)
        pages: dict[str, Callable[[], bytes]] = {
            "/": lambda: self.server.page.html(nonce).encode(),
            REPORT: lambda: storage.read_bytes(storage.join(self.server.page.root, "report.html")),
        }
        make = pages.get(self.path)
        if make is None:
            self._answer(HTTPStatus.NOT_FOUND, b"there is / and /report.html\n")
            return
        try:
            self._answer(HTTPStatus.OK, make(), nonce)
        except storage.NotFoundError:
            self._answer(HTTPStatus.NOT_FOUND, b"there is no report yet\n")
        except storage.StorageError as error:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, str(error).encode())

    def _answer(self, status: HTTPStatus, body: bytes, nonce: str = "") -> None:
        kind = "text/html" if status == HTTPStatus.OK else "text/plain"
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
            f"img-src data:; connect-src 'self'; script-src 'nonce-{nonce}'",
        }
        with suppress(ConnectionError):  # the reader has gone
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print no line for a request: the terminal shows the run."""


# ---------------------------------------------------------------- the page


@dataclass
class LivePage:
    """Makes the page of a job from what its run has written so far.

    Args:
        progress: The progress of the run, with its newest line and its trials.
        logs: URI of the training log of each source.
    """

    name: str
    root: str
    progress: Progress
    logs: Mapping[str, str] = field(default_factory=dict[str, str])
    _records: dict[str, TrialRecord] = field(default_factory=dict[str, TrialRecord], init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def html(self, nonce: str) -> str:
        """Return the page, which renews itself by a script with this nonce."""
        with self._lock:
            title, content = self._content()
        script = _SCRIPT.replace("SECONDS", str(RENEW_SECONDS))
        report = storage.join(self.root, "report.html")
        ended = f"The run has ended or cannot be reached. Its report is {report}"
        page = blocks.html_page(title, f"One to Many: job {self.name}, running", content)
        return page.replace(
            "<body>", f'<body data-ended="{html.escape(ended, quote=True)}">', 1
        ).replace("</body>", f'<script nonce="{nonce}">{script}</script>\n</body>', 1)

    def _content(self) -> tuple[str, list[Block]]:
        """Return the title and the blocks of the page."""
        planned: Mapping[str, Trial] = self.progress.trials
        self._records = self._of_now(self._records)
        missing = folders(one for name, one in planned.items() if name not in self._records)
        read = self._of_now(trial.read_records(self.root, missing))
        # one that failed or was stopped in an earlier run may run again
        done = {name: record for name, record in read.items() if record.status == "done"}
        self._records.update(done)
        known = self._records | read
        records = {name: known[name] for name in planned if name in known}
        running = self._running([planned[name] for name in planned if name not in records])
        ended = Counter(record.status for record in records.values())
        title = (
            f"{len(records)} of {len(planned)} trials ended"
            if planned
            else "Preparing data and sources"
        )
        figures = [
            (str(ended["done"]), "done", ""),
            (str(len(planned)), "planned so far", ""),
            (str(ended["failed"]), "failed", FAILED if ended["failed"] else ""),
        ]
        if ended["pruned"]:
            figures.append((str(ended["pruned"]), "stopped early", ""))
        content: list[Block] = [KeyFigures(figures)] if planned else []
        if self.progress.newest:
            content.append(Text(self.progress.newest, "lead"))
        if records:
            content.append(
                Text(
                    "Values are on validation rows and change until the run ends. Test rows, gains "
                    f"and verdicts are in the report, which is written at the end ({REPORT} shows "
                    "the one that is there).",
                    "note",
                )
            )
        content += _standing_blocks(list(records.values()))
        if running:
            content += [Heading("Running now"), Table(["Trial", "Step", "Newest"], running, 1)]
        content += self._source_blocks()
        failed = {one: record for one, record in records.items() if record.failed}
        errors = [[_name_of(planned[one]), record.error or ""] for one, record in failed.items()]
        if errors:
            content.append(Details(f"Failed: {len(errors)}", [Table(["Trial", "Why"], errors, 2)]))
        return title, content

    def _of_now(self, records: Mapping[str, TrialRecord]) -> dict[str, TrialRecord]:
        """Return the records without those that the run is to replace (``--remake changed``)."""
        outdated = self.progress.outdated
        return {
            name: record
            for name, record in records.items()
            if name not in outdated or record.run != outdated[name]
        }

    def _running(self, pending: Sequence[Trial]) -> list[list[str | Value]]:
        """Return trial, step and newest values of the trials that have written a log."""
        if storage.is_remote(self.root):
            return []  # a log there is older than the line above
        out: list[list[str | Value]] = []
        for one in pending:
            lines = _log_lines(storage.join(self.root, one.folder, "metrics.jsonl"))
            if lines and time.time() - lines[-1].get("time", 0.0) < 3600:
                out.append([_name_of(one), _step(lines[-1]), _newest(lines)])
        return out[:MAX_RUNNING]

    def _source_blocks(self) -> list[Block]:
        """Return the loss of each source by step."""
        out: list[Block] = []
        for name, uri in self.logs.items():
            lines = _log_lines(uri)
            if not lines:
                continue
            points = [
                (line["step"], line["loss"])
                for line in lines
                if math.isfinite(line.get("loss", math.nan))
            ]
            caption = f"{name}: step {_step(lines[-1])}, {_newest(lines)}"
            is_curve = len(points) > 1
            out.append(
                Figure(line_chart({name: points}, "loss"), caption) if is_curve else Text(caption)
            )
        return [Heading("Sources"), *out] if out else []


def _standing_blocks(records: Sequence[TrialRecord]) -> list[Block]:
    """Return for each target the values so far, and the learning curves of its final trials."""
    by_target: dict[str, dict[tuple[str, str, str, str], list[tuple[ResultRow, TrialRecord]]]]
    by_target = defaultdict(lambda: defaultdict(list))
    for record in records:
        row = next((row for row in record.rows if row.metric and row.is_validation), None)
        if row is None or row.value is None or math.isnan(row.value):
            continue
        key = row.label_fraction, row.source, results.technique(row), row.backbone
        by_target[row.target][key].append((row, record))
    out: list[Block] = []
    for target, entries in sorted(by_target.items()):
        num_backbones = Counter(key[:3] for key in entries)
        standings: list[_Standing] = []
        for (fraction, source, technique, backbone), trials in entries.items():
            has_others = num_backbones[fraction, source, technique] > 1
            name = f"{source} · {technique}" + (f" · {backbone}" if has_others else "")
            standings.append(_Standing.of(fraction, name, trials))
        num_rows: dict[str, int] = defaultdict(int)
        for standing in standings:
            fraction = standing.fraction
            num_rows[fraction] = max(num_rows[fraction], standing.num_rows)
        standings.sort(
            key=lambda standing: (
                -num_rows[standing.fraction],
                standing.fraction,
                *standing.order(),
            )
        )
        out += [Heading(f"{target}: values so far"), _standing_table(standings)]
        curves = _curves(standings)
        if curves:
            metric = standings[0].metric
            labels = plots.labels_text(standings[0].fraction)
            caption = f"Validation {metric} by step, mean over seeds, at {labels}."
            out.append(Figure(line_chart(curves, metric), caption))
    return out


@dataclass(frozen=True)
class _Standing:
    """The values so far of a source and technique on a target: final trials, or the search."""

    fraction: str
    name: str
    """Source and technique; with the backbone where several have the same ones (scratch)."""
    metric: str
    higher_is_better: bool
    value: float
    what: str
    records: Sequence[TrialRecord]
    """The final trials."""
    num_rows: int
    """Training rows, of the trial with the most."""

    @classmethod
    def of(
        cls,
        fraction: str,
        name: str,
        trials: Sequence[tuple[ResultRow, TrialRecord]],
    ) -> _Standing:
        """Return the mean of the final trials, or the best of the search where there is none."""
        first = trials[0][0]
        higher = first.higher_is_better is not False
        final = [(row, record) for row, record in trials if row.trial_stage == "final"]
        values = [row.value for row, _ in final or trials if row.value is not None]
        if final:
            value, what = fmean(values), f"mean of {plural(len(values), 'seed')}"
        else:
            value = max(values) if higher else min(values)
            what = f"best of {plural(len(values), 'search trial')}"
        rows_of = " (rows of the source)" if first.split == results.SOURCE_VALIDATION else ""
        return cls(
            fraction,
            name,
            first.metric or "",
            higher,
            value,
            what + rows_of,
            [record for _, record in final],
            max(row.n_train or 0 for row, _ in trials),
        )

    def order(self) -> tuple[bool, float]:
        """Return the sort key at a label fraction: final trials first, then the best value.

        The best of several search trials is not comparable with a mean of final ones.
        """
        best_first = -self.value if self.higher_is_better else self.value
        return not self.records, best_first


def _standing_table(standings: Sequence[_Standing]) -> Table:
    body: list[list[str | Value]] = []
    num_final = Counter(standing.fraction for standing in standings if standing.records)
    fraction_before = ""
    for standing in standings:
        fraction = standing.fraction
        is_first = fraction != fraction_before
        leads = is_first and bool(standing.records) and num_final[fraction] > 1
        fraction_before = fraction
        body.append(
            [
                Value((standing.name, "▲ leads"), WINS) if leads else Value((standing.name,)),
                plots.fraction_label(fraction),
                f"{standing.value:.4g}",
                standing.what,
            ]
        )
    arrow = "↑" if standings[0].higher_is_better else "↓"
    head = [
        "Source · technique",
        "Labels",
        f"Validation {standings[0].metric} {arrow}",
        "Kind of value",
    ]
    return Table(head, body)


def _curves(standings: Sequence[_Standing]) -> dict[str, Points]:
    """Return the learning curves of the best entries at the most labels, means over seeds."""
    out: dict[str, Points] = {}
    for standing in standings:
        if standing.fraction != standings[0].fraction or len(out) == MAX_LINES:
            break
        curves = [_points(record, standing) for record in standing.records]
        # a head that was solved has one point, whose step counts the solver's iterations
        curves = [points for points in curves if len(points) > 1]
        points = plots.mean_curve(curves) if curves else []
        if len(points) > 1:
            out[standing.name] = points
    return out


def _points(record: TrialRecord, standing: _Standing) -> Points:
    """Return step and value of each validation of a trial that has a finite value."""
    points: Points = []
    for step, metrics in record.curve:
        value = metrics.get(standing.metric)
        if value is not None and math.isfinite(value):
            points.append((float(step), value))
    return points


# ---------------------------------------------------------------- logs and names


def _log_lines(uri: str) -> list[dict[str, Any]]:
    """Return the records of a training log; [] where there is none.

    The last line may be half written.
    """
    try:
        text = storage.read_bytes(uri) if storage.is_remote(uri) else Path(uri).read_bytes()
    except (OSError, storage.StorageError):
        return []
    out: list[dict[str, Any]] = []
    for line in text.splitlines():
        with suppress(ValueError):
            out.append(json.loads(line))
    return out


def _step(line: Mapping[str, Any]) -> str:
    return f"{line.get('step', 0)} of {line.get('steps', '?')}"


def _newest(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the newest loss and validation values of a log."""
    newest: dict[str, float] = {}
    for line in lines:
        for name, value in line.items():
            is_shown = name == "loss" or name.startswith("validation_")
            if is_shown and isinstance(value, int | float):
                newest[name.replace("_", " ", 1)] = value
    return ", ".join(f"{name} {value:.4g}" for name, value in newest.items())


def _name_of(one: Trial) -> str:
    labels = plots.labels_text(fraction_text(one.label_fraction))
    return f"{one.target} · {one.source} · {one.drawn_technique} · {labels} · seed {one.seed}"


# ---------------------------------------------------------------- charts


def line_chart(series: Mapping[str, Points], y_name: str) -> str:
    """Draw lines by step as an SVG element with the colours of the page.

    The figures of the report are drawn by matplotlib, whose settings belong to the whole process:
    the thread of this page may not change them while the run draws its report.

    Args:
        series: Name to points (step, value), at least two each.
        y_name: What the values are.
    """
    width, height, left, top = 388, 150, 46, 8
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_low, x_range = min(xs), (max(xs) - min(xs)) or 1.0
    y_low, y_range = min(ys), (max(ys) - min(ys)) or 1.0

    def place(x: float, y: float) -> str:
        across = left + (width - left - 6) * (x - x_low) / x_range
        down = top + (height - top) * (1 - (y - y_low) / y_range)
        return f"{across:.1f},{down:.1f}"

    def text(
        x: float,
        y: float,
        words: str,
        anchor: str = "start",
        colour: str = "soft",
    ) -> str:
        return (
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="11" '
            f'fill="var(--{colour})">{html.escape(words)}</text>'
        )

    parts = [
        f'<path d="M{left} {top}V{height}H{width - 6}" fill="none" stroke="var(--line)"/>',
        text(left - 5, top + 9, f"{max(ys):.3g}", "end"),
        text(left - 5, height, f"{min(ys):.3g}", "end"),
        text(left, height + 15, f"{min(xs):g}"),
        text(width - 6, height + 15, f"step {max(xs):g}", "end"),
    ]
    for number, (name, points) in enumerate(series.items()):
        colour = f"var(--s{number % MAX_LINES})"
        line = " ".join(place(*point) for point in _thinned(points))
        y = height + 34 + 16 * number
        parts += [
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>',
            f'<path d="M{left} {y - 4}h22" stroke="{colour}" stroke-width="2.5"/>',
            text(left + 28, y, name, colour="ink"),
        ]
    full = height + 40 + 16 * len(series)
    label = html.escape(f"{y_name} by step: {', '.join(series)}", quote=True)
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {full}">{"".join(parts)}</svg>'
    )


def _thinned(points: Points) -> Points:
    """Return at most `MAX_POINTS` of the points, the last one among them."""
    every = math.ceil(len(points) / MAX_POINTS)
    return points[::-every][::-1] if every > 1 else points
