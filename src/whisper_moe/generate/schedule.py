"""Windows of many recordings, decoded side by side (continuous batching: Orca, Yu et al., OSDI 2022, section 3.2).

Windows wait, are opened together (packed and encoded), and search side by side; those that are done leave between two steps, and
others join. Recordings take turns, so that a short one does not wait for the end of a long one; each is handed on with its last
window. Memory does not grow with the length or the number of recordings. Nothing here looks at a clock: what is decoded
together depends on what was given alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, takewhile, zip_longest
from typing import Any

from whisper_moe.config import MAX_PACK_TOKENS
from whisper_moe.generate.decode import Opened, WindowDecoder, prompt_ids
from whisper_moe.generate.longform import (
    BUFFERED_SECONDS,
    BUFFERED_WINDOWS,
    Job,
    Recording,
    attempts,
    finish,
)
from whisper_moe.generate.search import Lane, Search
from whisper_moe.machine import SPARE, fitting_threads, give_back_memory
from whisper_moe.media.windows import Window, sounding
from whisper_moe.model.router import NONE, Routing

MAX_ROWS = 40
"""Rows decoded together: a window's beams or samples count each. More read the weights less often; their states take memory."""
MAX_POSITIONS = 4 * MAX_PACK_TOKENS
"""Encoder positions whose keys and values are held at a time: 24 kB each in whisper-base."""
PATIENCE = 8
"""Steps that windows wait at most until there are enough of them to be worth moving the caches of those that are under way."""
HELD = 4 * PATIENCE
"""Steps that a text waits at most for its words' times, which are told for several windows at once."""


class Schedule:
    """What a decoder has to do."""

    def __init__(self, decoder: WindowDecoder, progress: Callable[[float], None] | None = None) -> None:
        """``progress`` is told how many seconds of sound have just been finished."""
        self.decoder, self.progress = decoder, progress or (lambda seconds: None)
        self.recordings: list[Recording] = []
        """Those that are not complete, in the order in which they came."""
        self._lanes: dict[Any, Lane] = {}
        self._searched: dict[Search, tuple[Opened, int, Job]] = {}
        self._ended: dict[Opened, tuple[int, list[tuple[int, Job]]]] = {}
        self._ticks = 0

    def run(self, recordings: Iterable[Recording]) -> Iterator[Recording]:
        """Each recording as soon as it is complete or has failed: not in the order given."""
        for recording in recordings:
            self.submit(recording)
            while not recording.ended:  # no room
                yield from self.tick()
        while self.recordings:
            yield from self.tick()

    def submit(self, recording: Recording) -> None:
        """Raises ``ValueError`` for options that the model cannot follow."""
        options, ttt = recording.options, self.decoder.model.config.ttt
        if options.carry_ttt and (ttt is None or not ttt.encoder_layers or ttt.per_expert):
            raise ValueError("carry_ttt needs a model with TTT layers in its encoder that all experts share")
        if options.condition_on_previous_text:
            first = None if options.carry_initial_prompt else options.initial_prompt
            recording.said = prompt_ids(first, self.decoder.tokenizer)
        self.recordings.append(recording)
        try:
            self._read()
        except Exception:
            self.recordings.remove(recording)
            raise

    def cancel(self, recording: Recording) -> None:
        """Its windows are not decoded any further, and their places are free."""
        self.recordings.remove(recording)
        for search, (_, _, job) in list(self._searched.items()):
            if job.recording is recording:
                search.cancelled = True
                del self._searched[search]

    @fitting_threads()
    def tick(self) -> list[Recording]:
        """One step for everything that is under way; the recordings that are complete now."""
        self._ticks += 1
        self._read()
        self._admit()
        done = [self._searched.pop(search) for lane in self._lanes.values() for search in lane.advance()]
        self._lanes = {key: lane for key, lane in self._lanes.items() if len(lane)}
        for job in self._closed(done):
            self._judge(job)
        complete = [each for each in self.recordings if each.ended and not each.unsettled]
        for recording in complete:
            self.recordings.remove(recording)
        return complete

    # Windows that wait.

    def _read(self) -> None:
        """Cut windows off recordings, in turn, while there is room; each may hold one, and the first as many as it needs."""
        while reading := [each for each in self.recordings if self._may_read(each)]:
            for recording in reading:
                if self._may_read(recording):
                    self._cut(recording)

    def _may_read(self, recording: Recording) -> bool:
        if recording.ended or recording.full:
            return False
        # One that waits for its other windows to tell its language must get them.
        return self._room or recording is self.recordings[0] or all(job.accepted for job in recording.unsettled)

    @property
    def _room(self) -> bool:
        held = [job.window.duration for each in self.recordings for job in each.unsettled]
        return len(held) < BUFFERED_WINDOWS and sum(held) < BUFFERED_SECONDS

    def _cut(self, recording: Recording) -> None:
        """One window more, or the end; an error in its file ends it, and only it."""
        try:
            window = next(recording.windows, None)
        except ValueError as error:
            window, recording.error = None, error
        if window is None:
            recording.ended = True
            self._settle(recording)
            return
        recording.duration = max(recording.duration, window.end)
        sound = sounding(window)
        self.progress(window.duration - sound.duration)
        if len(sound.samples):
            recording.unsettled.append(Job(recording, sound, since=self._ticks))

    # Windows that begin.

    def _admit(self) -> None:
        """Open windows that wait and are decoded alike, if there is room for them and they are enough."""
        groups: dict[Any, list[Job]] = {}
        in_turn = zip_longest(*([job for job in each.unsettled if job.since is not None] for each in self.recordings))
        for job in filter(None, chain.from_iterable(in_turn)):
            alone = job.recording if job.recording.one_by_one else None
            groups.setdefault((alone, job.attempt, job.recording.options), []).append(job)
        waits = lambda jobs: min(job.since or 0 for job in jobs)  # noqa: E731
        ordered = sorted(groups.values(), key=lambda jobs: -jobs[0].attempt)
        if ordered and self._ticks - waits(oldest := min(ordered, key=waits)) > HELD:
            ordered = [oldest]  # what others leave free is kept for it
        for jobs in ordered:
            if chosen := self._fitting(jobs):
                self._open(chosen)
                return

    def _fitting(self, jobs: Sequence[Job]) -> list[Job]:
        """As many as there is room for; none if it is too early for them."""
        width = jobs[0].recording.options.search(self._how(jobs[0])[1]).beams
        used = width * sum(search.options.beams == width for search in self._searched)
        under_way = [self._positions(job) for _, _, job in self._searched.values()]
        room, free = MAX_ROWS - used, MAX_POSITIONS - sum(under_way)
        chosen, filled = list[Job](), 0
        for job in jobs:
            more = filled + self._positions(job)
            if (more > free or (len(chosen) + 1) * width > room) and (chosen or under_way):
                break
            chosen, filled = [*chosen, job], more
        rows = 4 * width * len(chosen)
        enough = not under_way or rows >= MAX_ROWS or 4 * filled >= MAX_POSITIONS
        if len(chosen) == len(jobs):  # else more wait than there is room for: it grows while they do
            late = self._ticks - (jobs[0].since or 0) >= PATIENCE
            enough = enough or late or (rows >= used > 0 and not jobs[0].attempt)  # other tries wait for one another
        return chosen if enough else []

    def _how(self, job: Job) -> tuple[float, float]:
        """Margin and temperature of the attempt at a window."""
        return attempts(job.recording.options)[job.attempt]

    def _positions(self, job: Job) -> int:
        return self.decoder.positions(len(job.window.samples), self._how(job)[0])

    def _open(self, jobs: list[Job]) -> None:
        jobs = sorted(jobs, key=lambda job: -len(job.window.samples))
        recording, (margin, temperature) = jobs[0].recording, self._how(jobs[0])
        for job in jobs:
            job.since, job.hint = None, job.hint or job.recording.only_language
        parts = self.decoder.open(
            [job.window.samples for job in jobs],
            recording.options,
            temperature=temperature,
            margin=margin,
            hints=[job.hint for job in jobs],
            carry=recording.carry if recording.options.carry_ttt else None,  # the only one, where anything is handed on
            previous=recording.said,
            routing=self._kept(jobs),
        )
        for opened in parts:
            key = opened.step, opened.searches[0].options.beams
            lane = self._lanes.get(key)
            if lane is None or not lane.joins:
                key = key if lane is None else opened
                lane = self._lanes[key] = Lane(opened.step, opened.end_of_text)
            opened.enter(lane)
            for place, search in enumerate(opened.searches):
                self._searched[search] = opened, place, jobs[opened.places[place]]

    def _kept(self, jobs: Sequence[Job]) -> Routing | None:
        """Tries at a window keep the experts of the first; the last of many is the base's alone, if it may answer."""
        attempt, options = jobs[0].attempt, jobs[0].recording.options
        kept = [job.result.routing for job in jobs if attempt and job.result and job.result.routing is not None]
        if not kept:
            return None
        moe, allowed = self.decoder.model.config.moe, self.decoder.allowed_experts(options)
        none = moe is not None and moe.none_choice and (allowed is None or NONE in allowed)
        routing, last = Routing.cat(kept), len(attempts(options)) - 1
        return routing.without_experts() if none and attempt == last > 1 else routing

    # Windows that are done.

    def _closed(self, done: Iterable[tuple[Opened, int, Job]]) -> Iterator[Job]:
        """Jobs with their results. Those that take another look at the sound wait for a while for others to share it."""
        for opened, place, job in done:
            self._ended.setdefault(opened, (self._ticks, []))[1].append((place, job))
        for opened, (since, pairs) in list(self._ended.items()):
            if opened.finish and self._ticks - since < HELD and not all(each.done for each in opened.searches):
                continue
            del self._ended[opened]
            for (_, job), result in zip(pairs, opened.close([place for place, _ in pairs]), strict=True):
                job.result, job.tries = result, job.tries + 1
                yield job
            give_back_memory(SPARE)

    def _judge(self, job: Job) -> None:
        """Accept a result that looks right, or the last; else the window waits for its next try."""
        tries, now = attempts(job.recording.options), (self._positions(job), self._how(job)[1])
        while job.attempt < len(tries) - 1 and job.looks_wrong(self.decoder.tokenizer):
            job.attempt += 1
            if (self._positions(job), self._how(job)[1]) != now:  # a window that fills its 30 s is not padded again
                job.since = self._ticks
                return
        job.accepted = True
        self._settle(job.recording)

    def _settle(self, recording: Recording) -> None:
        """Take over, in order, what windows say whose language is settled.

        Where that is unsure, the other windows of its recording that are there decide; then it is decoded again.
        """
        group = recording.unsettled
        whole = (recording.ended or recording.full) and all(job.accepted for job in group)
        heard = group if whole else [*takewhile(lambda job: job.accepted and (job.told or not job.unsure), group)]
        fresh = [job for job in heard if not job.told]
        for job in fresh:
            job.tell_language()
        for job in fresh:
            if job.astray:
                job.hint, job.attempt, job.accepted = recording.main_language, 0, False
                job.since = self._ticks
        while group and group[0].accepted and group[0].told:
            self._finish(group.pop(0))

    def _finish(self, job: Job) -> None:
        """What of its window is to be decoded next waits first."""
        left: list[Window] = finish(job, self.decoder.tokenizer)
        self.progress(job.window.duration - sum(window.duration for window in left))
        job.recording.unsettled[:0] = [Job(job.recording, window, since=self._ticks) for window in left]
