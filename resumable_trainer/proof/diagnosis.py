"""From what trials have told to the likely causes, in plain words. Pure.

Method: two resumes from one and the same snapshot are compared. If they part, the job does not repeat itself, and
the source of chance is the one without which they no longer part. If they agree with each other, and not
with the run that was never stopped, something is lost at a resume: what the user's code holds beside the parts
is compared, by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from resumable_trainer.proof.surroundings import SOURCES
from resumable_trainer.proof.trace import plain_path, same_samples_in_another_order
from resumable_trainer.proof.uses import steers
from resumable_trainer.snapshot.layout import FROZEN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from resumable_trainer.proof.trace import Divergence, Moment, Trace

_MAX_NAMES = 4
_CLOCK_CALLS = ("time.", "datetime.", "date.")
_LISTING_CALLS = ("os.listdir", "os.scandir")
_ENTROPY_CALLS = ("os.urandom", "random.seed")
_PROCESS_CALLS = ("os.getpid", "os.getppid", "tempfile")
_KINDS = {"generator": 0, "iterator": 1, "state": 2, "tensor": 3, "value": 4}  # what is lost, the likeliest first
_HAND_OVER = (
    "hand it over as a part: anything with state_dict() and load_state_dict(), or keep it in a small object that has"
    " them"
)


@dataclass(frozen=True)
class Cause:
    """Why a job does not resume exactly.

    Attributes:
        kind: "unseeded_generator", "state_not_handed_over", "data_order", "nondeterministic_kernel", "clock" or
            "unknown".
        text: What was found, for people.
        advice: What to do.
        where: Variables, or lines of the user's code.
    """

    kind: str
    text: str
    advice: str
    where: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What trials have shown.

    Attributes:
        undisturbed: The run that was never stopped.
        divergence: Where a resumed one left it first.
        failed: The start that left it.
        resumes: Two resumes from its first snapshot within an epoch; the second in perturbed surroundings.
        agree_without: By source of chance: whether two such resumes agree once it is taken away.
    """

    undisturbed: Trace
    divergence: Divergence
    failed: Trace
    resumes: tuple[Trace, Trace]
    agree_without: Mapping[str, bool] = field(default_factory=dict)


def causes(evidence: Evidence, *, repeats_itself: bool) -> list[Cause]:
    """The likely causes, the surest first; never empty."""
    if repeats_itself:
        undisturbed = evidence.undisturbed
        lost = lost_variables(evidence.failed, undisturbed) or _lost_at_first(evidence)
        unsteady = _unsteady(*evidence.resumes)
        return [_lost(evidence, [found for found in lost if found[0] not in unsteady])]
    found = [_source(name, evidence) for name, agree in evidence.agree_without.items() if agree and name != "all"]
    if not found and evidence.agree_without.get("all"):
        names = [name for name in evidence.agree_without if name != "all"]
        found = [_several(evidence, names)]
    return found or [_computation(evidence)]


def suspects(evidence: Evidence) -> list[str]:
    """Sources of chance that the script may have met; one that it never asks is not to agree by chance."""
    calls, drawn = _calls(evidence, _CLOCK_CALLS), evidence.undisturbed.facts.get("drawn", ())
    unmet = {"clock": not calls, "listing": not _calls(evidence, _LISTING_CALLS), "globals": not drawn}
    return [source for source in SOURCES if not unmet.get(source)]


# -- what a resume does not bring back ----------------------------------------------------------------


def lost_variables(resumed: Trace, undisturbed: Trace) -> list[tuple[str, str]]:
    """(path, kind) of what has another value after the resume than it had there, the likeliest first.

    Only what moves with the training counts: a constant of the process (its start time, say) does not. A variable
    that is not there yet is a temporary of the loop's body.
    """
    first = next((moment for moment in resumed.moments if moment.variables), None)
    if first is None:
        return []
    before = [moment for moment in undisturbed.moments if moment.variables]
    same = next((moment for moment in before if moment.key == first.key), None)
    if same is None:
        return []
    start = undisturbed.opened[0].get("variables", {}) if undisturbed.opened else {}
    history: list[Mapping[str, object]] = [
        {path: tuple(found) for path, found in start.items()},
        *(moment.variables for moment in before[: before.index(same)]),
    ]
    lost = [
        (path, found[0])
        for path, found in first.variables.items()
        if path in same.variables and same.variables[path] != found and _moves(path, same, history)
    ]
    return sorted(lost, key=_likeliest)


def lost_without_effect(
    starts: Iterable[Trace], undisturbed: Trace, pair: tuple[Trace, Trace]
) -> list[tuple[str, str]]:
    """(path, kind) of what no resume brings back although all came out the same, so far.

    Args:
        starts: Resumes, each with what it found at its first batch.
        undisturbed: The run that was never stopped.
        pair: Two resumes from one snapshot; what they do not agree on (a clock) was never the run's to bring back.
    """
    lost = dict.fromkeys(found for start in starts for found in lost_variables(start, undisturbed))
    unsteady = _unsteady(*pair)
    return sorted((found for found in lost if found[0] not in unsteady), key=_likeliest)


def _unsteady(one: Trace, other: Trace) -> set[str]:
    """Variables that differ between two starts from the same place."""
    theirs = other.by_key()
    return {
        path
        for key, moment in one.by_key().items()
        if key in theirs
        for path, found in moment.variables.items()
        if theirs[key].variables.get(path, found) != found
    }


def _likeliest(item: tuple[str, str]) -> tuple[int, int, str]:
    return _KINDS[item[1]], item[0].count("."), item[0]


def without_effect(lost: Sequence[tuple[str, str]], sources: Sequence[str]) -> tuple[list[Cause], list[str]]:
    """(causes, names) of what is lost without an effect so far: what will have one, and what need not.

    A scheduler or an average that is not brought back is another one at the end, whether or not it has been used by
    then; so is a counter that the script's text makes decide something.
    """
    names = list(dict.fromkeys(plain_path(path) for path, _ in lost))
    sure = [plain_path(path) for path, kind in lost if kind == "state" or steers(_identifier(path), sources)]
    sure = list(dict.fromkeys(sure))
    if not sure:
        return [], names
    cause = Cause(
        "state_not_handed_over",
        f"not brought back by a resume: {_quoted(sure[:_MAX_NAMES])}; it has made no difference within these few"
        " batches, but it will",
        _HAND_OVER,
        tuple(sure[:_MAX_NAMES]),
    )
    return [cause], [name for name in names if name not in sure]


def missing_name(output: str) -> str | None:
    """The variable without which a script has ended, by the last line of its output that names an error."""
    lines = re.findall(r"^(?:NameError|UnboundLocalError): .*?'(\w+)'", output, re.MULTILINE)
    return lines[-1] if lines else None


def unset(name: str) -> Cause:
    """A variable that the loop's body sets, and what comes after the loop reads."""
    return Cause(
        "state_not_handed_over",
        f"`{name}` is set while batches are trained, and read after them: a resume at the end of an epoch's batches"
        " has none to train, so that it is not there",
        f"take it from the run (run.averages has the means of what run.log was given), or set `{name}` before the loop"
        " and hand it over as a part",
        (name,),
    )


def _identifier(path: str) -> str:
    return _last_name(plain_path(path)).partition("[")[0]


def _lost_at_first(evidence: Evidence) -> list[tuple[str, str]]:
    return lost_variables(evidence.resumes[0], evidence.undisturbed)


def _moves(path: str, same: Moment, history: Sequence[Mapping[str, object]]) -> bool:
    return any(path in earlier and earlier[path] != same.variables[path] for earlier in history)


def _lost(evidence: Evidence, lost: Sequence[tuple[str, str]]) -> Cause:
    all_names = tuple(dict.fromkeys(plain_path(path) for path, _ in lost))
    names = all_names[:_MAX_NAMES]
    if lost and lost[0][1] == "generator":
        return Cause(
            "state_not_handed_over",
            f"the random generator {_quoted(names[:1])} is not among the parts: after a resume it begins anew",
            f'hand it over: Run(..., state={{..., "{_last_name(names[0])}": {_expression(names[0])}}})',
            names,
        )
    if lost and lost[0][1] == "iterator":
        return Cause(
            "data_order",
            f"the iterator {_quoted(names[:1])} was begun outside the epoch loop, and is not among the parts: after a"
            " resume it begins anew",
            "let run.batches go over the data themselves (a DataLoader, tensors, a sequence); or give what it iterates"
            " over state_dict() and load_state_dict(), and hand that over as a part",
            names,
        )
    if lost:
        return Cause(
            "state_not_handed_over",
            f"not brought back by a resume: {_quoted(names)}"
            + (f" and {len(all_names) - len(names)} more" if len(all_names) > len(names) else ""),
            _HAND_OVER,
            names,
        )
    if evidence.divergence.data:
        return Cause(
            "data_order",
            "the batches after a resume are not those of the undisturbed run"
            + (" (the same samples in another order)" if _is_order(evidence) else "")
            + ": the order of the data does not come from the run",
            "let run.batches see the data themselves: a DataLoader, tensors, a sequence, or an iterable that has"
            " state_dict() and load_state_dict()",
        )
    return Cause(
        "state_not_handed_over",
        "a resume brings back less than the run had, and no variable of the script's shows what: something held"
        " inside a library, or in an object that cannot be looked into",
        "hand over everything that lives across batches: Run(..., state={...})",
    )


# -- what chance comes from ---------------------------------------------------------------------------


def _source(name: str, evidence: Evidence) -> Cause:
    makers = {
        "globals": _unseeded_global,
        "entropy": _unseeded,
        "clock": _clock,
        "hash": _hash,
        "listing": _listing,
        "kernels": _kernels,
    }
    return makers[name](evidence)


def _unseeded_global(evidence: Evidence) -> Cause:
    names = tuple(evidence.undisturbed.facts.get("drawn", ())) or ("a global generator",)
    seeds = {"Python": "random.seed(0)", "NumPy": "numpy.random.seed(0)", "torch": "torch.manual_seed(0)"}
    advice = "seed it at the top of the script (" + ", ".join(seeds.get(n, "seed(0)") for n in names) + ")"
    text = (
        f"the script draws from the global generator of {' and '.join(names)} before the run is opened, and nothing"
        " has seeded it: each start draws something else"
    )
    if evidence.divergence.data:
        return Cause("data_order", f"the order of data is made outside the run: {text}", advice, names)
    return Cause("unseeded_generator", text, advice, names)


def _unseeded(evidence: Evidence) -> Cause:
    names, calls = _generators_that_begin_apart(*evidence.resumes), _calls(evidence, _ENTROPY_CALLS)
    what = f"{_quoted(names)} is seeded by nothing" if names else "something random is seeded by nothing"
    where = f" ({', '.join(calls)})" if calls else ""
    advice = "seed it, and hand it over as a part"
    if names:
        advice += f': Run(..., state={{..., "{_last_name(names[0])}": {_expression(names[0])}}})'
    else:
        advice += "; it draws from os.urandom, as numpy.random.default_rng(), random.Random(), secrets and uuid4 do"
    text = f"{what}: each start draws something else{where}"
    return Cause("unseeded_generator", text, advice, (*names, *calls))


def _seeded_otherwise(names: Sequence[str], by: str) -> Cause:
    """Generators that begin apart, although not for want of a seed."""
    return Cause(
        "unseeded_generator",
        f"{_quoted(names)} is seeded by something that is not the same at two starts{by}",
        f'seed it with a number, and hand it over: Run(..., state={{..., "{_last_name(names[0])}":'
        f" {_expression(names[0])}}})",
        tuple(names),
    )


def _generators_that_begin_apart(one: Trace, other: Trace) -> tuple[str, ...]:
    """Generators whose state differs between two starts before anything was drawn in the loop."""
    for source in _first_variables(one, other):
        mine, theirs = source
        names = [
            path
            for path, (kind, digest) in mine.items()
            if kind == "generator" and path in theirs and theirs[path][1] != digest
        ]
        if names:
            return tuple(sorted(names, key=lambda path: (path.count("."), path))[:_MAX_NAMES])
    return ()


def _first_variables(one: Trace, other: Trace) -> Iterable[tuple[Mapping[str, tuple[str, str]], ...]]:
    if one.opened and other.opened:
        yield one.opened[0].get("variables", {}), other.opened[0].get("variables", {})
    for a, b in zip(one.moments, other.moments, strict=False):
        if a.variables and b.variables:
            yield a.variables, b.variables


def _clock(evidence: Evidence) -> Cause:
    calls = _calls(evidence, _CLOCK_CALLS)
    what = "the data" if evidence.divergence.data else "what is computed or logged"
    return Cause(
        "clock",
        f"the clock gets into {what}" + (f": {', '.join(calls)}" if calls else ""),
        "take the time out of it, or log it elsewhere than in run.log: a run killed and resumed cannot have the times"
        " of one that was not",
        calls,
    )


def _hash(evidence: Evidence) -> Cause:
    names = _generators_that_begin_apart(*evidence.resumes)
    if names:
        return _seeded_otherwise(names, ": hash() of a text, or the order of a set, which are others in each process")
    return Cause(
        "data_order",
        "the order of a set, or another thing that hangs on the hashes of texts (hash() itself), which are others in"
        " each process, gets into the training",
        "sort it (sorted(names)); in place of hash(text) take zlib.crc32(text.encode()); or start Python with"
        " PYTHONHASHSEED=0",
    )


def _listing(evidence: Evidence) -> Cause:
    calls = _calls(evidence, _LISTING_CALLS)
    return Cause(
        "data_order",
        "the order in which a directory lists its files gets into the training: it is another one on another machine,"
        " or after a copy" + (f" ({', '.join(calls)})" if calls else ""),
        "sort what is listed: sorted(path.iterdir())",
        calls,
    )


def _kernels(evidence: Evidence) -> Cause:
    return Cause(
        "nondeterministic_kernel",
        f"a kernel gives other bits each time: {_changed(evidence.divergence)} differ after the same batch, from the"
        " same state and generators; with deterministic algorithms and one thread they do not",
        "torch.use_deterministic_algorithms(True), and CUBLAS_WORKSPACE_CONFIG=:4096:8 on CUDA; torch then names the"
        " operation",
    )


def _several(evidence: Evidence, names: Sequence[str]) -> Cause:
    """No source alone, but all together: more than one of them."""
    generators = _generators_that_begin_apart(*evidence.resumes)
    calls = _calls(evidence, _CLOCK_CALLS)
    suspects = [f"generators {_quoted(generators)}"] if generators else []
    suspects += [f"the clock ({', '.join(calls)})"] if calls else []
    return Cause(
        "unseeded_generator" if generators else "clock" if calls else "data_order",
        "several sources of chance together" + (f": {' and '.join(suspects)}" if suspects else ""),
        "take them away one by one, and ask doctor again: " + ", ".join(names),
        (*generators, *calls),
    )


def _computation(evidence: Evidence) -> Cause:
    """Neither clock nor entropy nor hashes nor listings nor torch's own kernels."""
    names, pids = _generators_that_begin_apart(*evidence.resumes), _calls(evidence, _PROCESS_CALLS)
    if names:
        return _seeded_otherwise(names, f": the number of the process, it seems ({', '.join(pids)})" if pids else "")
    if pids:
        return Cause(
            "data_order" if evidence.divergence.data else "unseeded_generator",
            "the number of the process, or the name of a temporary file, others at each start, may get into the"
            f" training: {', '.join(pids)}",
            "take it out of whatever is computed, and seed with a number of your own",
            pids,
        )
    if evidence.divergence.data:
        return Cause(
            "data_order",
            "the data differ from one start to the next, whatever else is held still: they come from outside (a"
            " network, files that change, threads that race)",
            "let the order of data come from the run: a DataLoader, tensors or a sequence in run.batches",
        )
    return Cause(
        "nondeterministic_kernel",
        f"the same batch, state and generators give other bits each time: {_changed(evidence.divergence)} differ. It"
        " is not the clock, nor entropy; it may be threads that race, memory that is read before it is written, or"
        " an operation that has no deterministic form",
        "compute it in a fixed order; torch.use_deterministic_algorithms(True) names torch's own such operations",
    )


# -- words --------------------------------------------------------------------------------------------


def _is_order(evidence: Evidence) -> bool:
    return same_samples_in_another_order(evidence.divergence, evidence.undisturbed)


def _calls(evidence: Evidence, prefixes: tuple[str, ...]) -> tuple[str, ...]:
    calls = {**evidence.resumes[0].calls, **evidence.undisturbed.calls}
    found = [f"{name} at {where}" for name, places in calls.items() if name.startswith(prefixes) for where in places]
    return tuple(dict.fromkeys(found))[:_MAX_NAMES]


def _changed(divergence: Divergence) -> str:
    return ", ".join(sections_of(divergence)) or "results"


def sections_of(divergence: Divergence) -> list[str]:
    """Parts whose state differs, the loop's own record last."""
    names = list(dict.fromkeys(name.partition("/")[0].removesuffix(FROZEN) for name in divergence.state))
    return sorted(names, key=lambda name: name == "loop")


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _last_name(path: str) -> str:
    return path.rpartition(".")[2]


def _expression(path: str) -> str:
    """How the script would write it: without the name of the function it is in."""
    return path.partition(".")[2] or path
