"""The schemas of a benchmark's result: of an operator, of training steps, of another library."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What all results have: a line of JSON in ``bench/results``.

    Attributes:
        op: Operator of :mod:`kfac_fast.ops`, ``"step"`` or ``"peer"``.
        shape: Name of the shape in ``shapes.py``, or of the network.
        dtype: Dtype of the input.
        implementation: The row of the table in :mod:`kfac_fast.backends` that served the call; of
            networks, the operator ``gram``.
        rounds: How often each side was timed, in turn.
        error: Relative error in the Frobenius norm, of the worst matrix.
        device: Model of the processor or the GPU.
        threads: Threads of PyTorch on the CPU.
        instruction_set: Instruction set of the compiled CPU kernels; None if not built.
        torch: Version of PyTorch.
        kfac_fast: Version of the package.
        commit: Commit of the working tree, "-dirty" appended if it has changes; None outside git.
        date: Day of the run, UTC.
    """

    op: str
    shape: str
    dtype: str
    implementation: str
    rounds: int
    error: float
    device: str
    threads: int
    instruction_set: str | None
    torch: str
    kfac_fast: str
    commit: str | None
    date: str


@dataclass(frozen=True, kw_only=True)
class Comparison(Measurement):
    """Ours beside a baseline, call by call.

    Attributes:
        p20_ms: Time of one call of ours that a fifth of the rounds stayed below.
        p50_ms: Median time of ours.
        p80_ms: Time of ours that four fifths stayed below.
        baseline_p20_ms: As ``p20_ms``, of the baseline.
        baseline_p50_ms: As ``p50_ms``, of the baseline.
        baseline_p80_ms: As ``p80_ms``, of the baseline.
        ratio_of_medians: Baseline over ours: above 1, ours is faster.
        median_of_ratios: Median over the rounds of baseline over ours.
        added_us: Median of ours less median of the baseline where that is below 200 us, else None.
        beside: What else was measured in the same run, because a bar is set in it: by a name that
            ends in its unit, "ms" for the median time of another call in the same rounds, "MB" for
            peak memory over what the process held before a call; "peak MB" is ours.
    """

    p20_ms: float
    p50_ms: float
    p80_ms: float
    baseline_p20_ms: float
    baseline_p50_ms: float
    baseline_p80_ms: float
    ratio_of_medians: float
    median_of_ratios: float
    added_us: float | None
    beside: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Record(Comparison):
    """An operator; the error is relative to float64.

    Attributes:
        way: The algorithm that this implementation chose for the shape; None if it has only one.
        baseline: The way of computing it in plain PyTorch that was the fastest for this shape.
        baseline_error: As ``error``, of the baseline.
        gflop: Operations of the definition in 1e9, symmetry used; an implementation may need fewer.
        gflop_per_s: ``gflop`` over the median of ours.
        gb_per_s: Bytes of the inputs and the result, each moved once, over the median of ours.
        percent_of_floor: The least time that ``gflop`` and those bytes would take at the rates of
            PyTorch's large matrix products and copies, measured once in the same process, as a
            share of ours; above 100 where an implementation needs fewer operations or is faster.
    """

    way: str | None
    baseline: str
    baseline_error: float
    gflop: float
    gflop_per_s: float
    gb_per_s: float
    percent_of_floor: float


@dataclass(frozen=True, kw_only=True)
class StepRecord(Measurement):
    """Training steps of a network.

    Ratios are to SGD's time in the same round, medians over the rounds; the reference has fewer.
    The error is the difference of the factors from the pure-PyTorch version's.

    Attributes:
        approx: ``"expand"`` or ``"reduce"``.
        sgd_ms: Median time of a step of SGD with momentum.
        hooks_ms: What hooks with nothing due add to forward and backward pass.
        plain_ratio: A step that only preconditions.
        update_ratio: A step that also updates the factors.
        refresh_ratio: A step that also refreshes the inverses.
        intervals_ratio: Mean over 100 steps with factors updated every 10 and inverses refreshed
            every 100: 90 plain ones, 9 updates, 1 refresh.
        reference_intervals_ratio: The same with the pure-PyTorch version.
        reference_refresh_ratio: As ``refresh_ratio``, with the pure-PyTorch version.
        state_mb: Bytes of factors and inverses in 1e6.
        activations_mb: What the forward pass keeps for the backward pass.
        peak_mb: Peak memory of a step that refreshes, above that of SGD's, without the factors and
            inverses that were there before; None where it is not measured.
    """

    approx: str
    sgd_ms: float
    hooks_ms: float
    plain_ratio: float
    update_ratio: float
    refresh_ratio: float
    intervals_ratio: float
    reference_intervals_ratio: float
    reference_refresh_ratio: float
    state_mb: float
    activations_mb: float
    peak_mb: float | None


@dataclass(frozen=True, kw_only=True)
class PeerRecord(Comparison):
    """Another library by itself, the baseline, and with kfac_fast.

    The error is the difference of the results, relative to the library's. Beside are in "ms" the
    median times of "KFAC", kfac_fast alone to a like result (a step, or an operator), and of "bare"
    passes: forward, and backward to the outputs of the layers. In "MB" the "peak" with kfac_fast,
    that of the "library", that of "bare" passes, that of "KFAC" with the state that it keeps; and
    the size of the "result", if it is not there before the call.

    Attributes:
        library: The library's name.
        version: Its version.
        result: What was computed; with the library, a key of ``MAKERS`` in ``peer_calls.py``.
    """

    library: str
    version: str
    result: str


AnyRecord = Record | StepRecord | PeerRecord
