"""Exporters: when they export, what they keep (J01 to J05, V25)."""

import functools
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from paramserver.checkpoint.storage import join, storage_of
from paramserver.errors import ConfigError
from paramserver.estimator import BestExporter, FinalExporter, LatestExporter, loss_smaller
from paramserver.estimator.export.folder import delete_export, delete_old_exports
from paramserver.estimator.uploading import summary_writer
from paramserver.summary import SummaryWriter


class FakeEstimator:
    """Makes a folder for each export, named as by a clock that goes on, and remembers how it was asked."""

    def __init__(self, model_dir):
        self.model_dir = str(model_dir)
        self.asked = []
        self.now = 1_700_000_000

    def export_model(self, export_path, serving_input_fn, checkpoint_path, assets_extra):
        self.asked.append((serving_input_fn, checkpoint_path, assets_extra))
        self.now += 1
        folder = Path(export_path, str(self.now))
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("")
        return str(folder)


@pytest.fixture
def estimator(tmp_path):
    return FakeEstimator(tmp_path)


def exported(exporter, estimator, *losses, path="export", final=False):
    """Whether each of some evaluations was exported."""
    folder = f"{estimator.model_dir}/{path}"
    results = [exporter.export(estimator, folder, "ckpt", {"loss": loss, "global_step": 1}, final) for loss in losses]
    return [result is not None for result in results]


def kept(estimator):
    return sorted(int(path.name) - 1_700_000_000 for path in Path(estimator.model_dir, "export").iterdir())


def write_history(model_dir, losses, folder="eval"):
    """Evaluations of an earlier process, in the order of the steps."""
    writer = SummaryWriter(f"{model_dir}/{folder}")
    for step, loss in enumerate(losses):
        writer.scalar("loss", loss, step)
    writer.close()


# --- what all of them have in common


@pytest.mark.parametrize("kind", [FinalExporter, LatestExporter, BestExporter])
def test_v25_what_an_exporter_passes_on(kind, estimator):
    def serving_input_fn():
        raise AssertionError

    exporter = kind("mine", serving_input_fn, assets_extra={"a.txt": "b.txt"})
    assert repr(exporter) == f"{kind.__name__}('mine')"
    path = exporter.export(estimator, f"{estimator.model_dir}/export", "ckpt-5", {"loss": 1.0}, True)
    assert path == f"{estimator.model_dir}/export/1700000001"
    assert estimator.asked == [(serving_input_fn, "ckpt-5", {"a.txt": "b.txt"})]


@pytest.mark.parametrize("kind", [FinalExporter, LatestExporter, BestExporter])
@pytest.mark.parametrize("name", ["", None, 3, "a/b", ".."])
def test_an_exporter_is_named_like_a_folder(kind, name):
    with pytest.raises(ConfigError, match=f"{kind.__name__}: name"):
        kind(name)


def test_a_serving_input_fn_is_a_function():
    with pytest.raises(TypeError, match="LatestExporter: serving_input_fn: expected a function or None, got 3"):
        LatestExporter("latest", 3)


@pytest.mark.parametrize("kind", [LatestExporter, BestExporter])
@pytest.mark.parametrize("count", [0, -1])
def test_j02_exports_to_keep_is_positive(kind, count):
    with pytest.raises(ValueError, match=f"{kind.__name__}: exports_to_keep: .* None to keep all, got {count}"):
        kind("name", exports_to_keep=count)


# --- which evaluations are exported


def test_j01_final_exports_the_final_model_only(estimator):
    exporter = FinalExporter("final")
    assert exported(exporter, estimator, 3.0, 1.0) == [False, False]
    assert exported(exporter, estimator, 2.0, final=True) == [True]


def test_j02_latest_exports_every_time(estimator):
    assert exported(LatestExporter("latest"), estimator, 1.0, 2.0, 1.0) == [True, True, True]


def test_j03_best_exports_what_is_better(estimator):
    assert exported(BestExporter(), estimator, 5.0, 6.0, 4.0, 4.0, 4.5, 3.0) == [True, False, True, False, False, True]


def test_j03_better_is_what_compare_fn_says(estimator):
    def higher(best_eval_result, current_eval_result):
        return current_eval_result["loss"] > best_eval_result["loss"]

    assert exported(BestExporter(compare_fn=higher), estimator, 5.0, 6.0, 4.0) == [True, True, False]


@pytest.mark.parametrize("bound", [{}, {"current_eval_result": 3, "best_eval_result": 2}])
def test_j03_a_compare_fn_may_have_more_arguments_of_its_own(bound):
    def compare(current_eval_result, best_eval_result, tolerance=0.0):
        raise AssertionError

    BestExporter(compare_fn=functools.partial(compare, **bound))
    BestExporter(compare_fn=lambda **results: True)


@pytest.mark.parametrize(
    ("compare_fn", "message"),
    [
        (None, "compare_fn: expected a function, got None"),
        (lambda best_eval_result: True, "must take arguments named best_eval_result and current_eval_result"),
        (lambda: True, "has no 'best_eval_result'"),
        (lambda best, current_eval_result: True, "asks for an argument 'best'"),
        (lambda best_eval_result, current_eval_result, third: True, "asks for an argument 'third'"),
    ],
)
def test_j03_a_compare_fn_that_cannot_be_called_is_refused_at_once(compare_fn, message):
    with pytest.raises(ValueError, match=message):
        BestExporter(compare_fn=compare_fn)


@pytest.mark.parametrize(
    ("best", "current", "which"),
    [({}, {"loss": 1.0}, "best"), (None, {"loss": 1.0}, "best"), ({"loss": 1.0}, {"error": 1.0}, "current")],
)
def test_j03_a_missing_loss_is_refused(best, current, which):
    with pytest.raises(ValueError, match=f"{which}_eval_result has no 'loss', only (nothing|error); give .* another"):
        loss_smaller(best, current)


# --- after a restart


def test_j04_the_first_evaluation_of_a_process_is_exported_where_there_is_no_export_even_if_worse(estimator):
    write_history(estimator.model_dir, [50.0, 60.0])
    assert exported(BestExporter(), estimator, 100.0, 10.0, 20.0) == [True, True, False]


def test_j04_the_best_survives_a_restart(estimator):
    """What is exported though it is worse does not become the best."""
    write_history(estimator.model_dir, [70.0, 50.0, 60.0])
    assert exported(BestExporter(), estimator, 100.0, 55.0, 50.0, 49.0) == [True, False, False, True]


def test_j04_the_pattern_says_where_evaluations_are(estimator):
    write_history(estimator.model_dir, [50.0], folder="eval_test")
    assert exported(BestExporter(event_file_pattern="eval_test/*.tfevents.*"), estimator, 100.0, 55.0) == [True, False]
    assert exported(BestExporter(), estimator, 100.0, 55.0) == [True, True]
    assert exported(BestExporter(event_file_pattern=None), estimator, 100.0, 55.0) == [True, True]


def test_j04_an_earlier_evaluation_with_other_metrics_does_not_count(estimator):
    """compare_fn would not find in it what it asks for."""
    write_history(estimator.model_dir, [50.0])
    exporter = BestExporter(
        compare_fn=lambda best_eval_result, current_eval_result: (
            current_eval_result["accuracy"] > best_eval_result["accuracy"]
        )
    )
    results = [{"loss": 1.0, "accuracy": accuracy, "global_step": 7} for accuracy in (0.5, 0.4, 0.6)]
    paths = [exporter.export(estimator, f"{estimator.model_dir}/export", "ckpt", result, False) for result in results]
    assert [path is not None for path in paths] == [True, False, True]


def test_j04_an_export_that_failed_is_no_first_one(estimator, monkeypatch):
    exporter = BestExporter()
    write_history(estimator.model_dir, [1.0])
    with monkeypatch.context() as patched:
        patched.delattr(FakeEstimator, "export_model")
        with pytest.raises(AttributeError):
            exported(exporter, estimator, 5.0)
    assert exported(exporter, estimator, 5.0, 5.0) == [True, False]


@pytest.mark.parametrize("losses", [[50.0], [70.0, 50.0, 60.0]])
def test_j04_after_a_restart_the_first_evaluation_is_exported_only_if_it_is_better(estimator, losses):
    """It keeps one export: the best stays."""
    assert exported(BestExporter(exports_to_keep=1), estimator, 50.0) == [True]
    write_history(estimator.model_dir, losses)
    assert exported(BestExporter(exports_to_keep=1), estimator, 60.0, 55.0, 50.0) == [False, False, False]
    assert kept(estimator) == [1]
    assert exported(BestExporter(exports_to_keep=1), estimator, 40.0, 45.0) == [True, False]
    assert kept(estimator) == [2]


def test_j04_the_present_evaluation_is_not_taken_for_an_earlier_one(estimator):
    """The evaluator has written it before it exports."""
    assert exported(BestExporter(), estimator, 50.0) == [True]
    write_history(estimator.model_dir, [70.0, 0.1])
    assert exported(BestExporter(), estimator, 0.1, 0.2) == [True, False]


def test_j04_nan_is_never_the_best(estimator):
    nan = math.nan
    assert exported(BestExporter(), estimator, nan, 5.0, nan, 6.0, 4.0) == [False, True, False, False, True]
    write_history(estimator.model_dir, [nan, 50.0, nan])
    assert exported(BestExporter(), estimator, nan, 60.0, 40.0) == [False, False, True]


def test_j04_nan_in_what_is_not_compared_does_not_matter(estimator):
    exporter = BestExporter()
    for loss, expected in [(5.0, True), (4.0, True), (4.5, False)]:
        result = {"loss": loss, "auc": math.nan, "global_step": 7}
        path = exporter.export(estimator, f"{estimator.model_dir}/export", "ckpt", result, False)
        assert (path is not None) == expected


def test_j04_nan_that_another_compare_fn_would_take_is_not_the_best(estimator):
    exporter = BestExporter(compare_fn=lambda best_eval_result, current_eval_result: not (
        current_eval_result.get("loss") >= best_eval_result["loss"]
    ))  # fmt: skip
    assert exported(exporter, estimator, 5.0, math.nan, 4.0) == [True, False, True]


def test_j04_exports_of_unknown_worth_are_told_of(estimator, caplog):
    assert exported(BestExporter(), estimator, 50.0) == [True]
    assert not caplog.records
    assert exported(BestExporter(), estimator, 60.0) == [True]
    assert "no earlier evaluation in 'eval/*.tfevents.*' to compare with" in caplog.text


def of_class(best_eval_result, current_eval_result):
    return current_eval_result["by"]["class"][1] > best_eval_result["by"]["class"][1]


def test_a_compare_fn_finds_nests_as_they_were_before_a_restart_too(estimator):
    """Evaluations are written as scalars, and read back with the structure of the present one."""
    writer = SummaryWriter(f"{estimator.model_dir}/eval")
    for step, accuracy in enumerate([0.5, 0.75, 0.25]):
        for name, value in {"loss": 1.0, "by/class/0": 0.0, "by/class/1": accuracy}.items():
            writer.scalar(name, value, step)
    writer.close()
    Path(estimator.model_dir, "export", "1600000000").mkdir(parents=True)
    exporter = BestExporter(compare_fn=of_class)
    for accuracy, expected in [(0.6, False), (0.8, True), (0.7, False)]:
        result = {"loss": 1.0, "by": {"class": np.array([1.0, accuracy])}, "global_step": 7}
        path = exporter.export(estimator, f"{estimator.model_dir}/export", "ckpt", result, False)
        assert (path is not None) == expected


def test_j04_nan_in_a_dict_is_never_the_best(estimator):
    exporter = BestExporter(compare_fn=lambda best_eval_result, current_eval_result: (
        current_eval_result["all"]["accuracy"] > best_eval_result["all"]["accuracy"]
    ))  # fmt: skip
    for accuracy, expected in [(math.nan, False), (0.5, True), (0.4, False)]:
        result = {"loss": 1.0, "all": {"accuracy": accuracy}, "global_step": 7}
        path = exporter.export(estimator, f"{estimator.model_dir}/export", "ckpt", result, False)
        assert (path is not None) == expected


@pytest.mark.parametrize("result", [None, {}, {"error": 1.0}])
def test_j03_what_is_no_evaluation_is_refused_before_anything_is_exported(estimator, result):
    with pytest.raises(ConfigError, match="eval_result"):
        BestExporter().export(estimator, f"{estimator.model_dir}/export", "ckpt", result, False)
    assert not Path(estimator.model_dir, "export").exists()


# --- what is kept


@pytest.mark.parametrize("kind", [LatestExporter, BestExporter])
@pytest.mark.parametrize("path", ["export", "export/"])
def test_j02_j05_the_newest_are_kept_also_with_a_slash_at_the_end(kind, path, estimator):
    assert all(exported(kind("name", exports_to_keep=2), estimator, 5.0, 4.0, 3.0, 2.0, path=path))
    assert kept(estimator) == [3, 4]


def test_j02_none_keeps_all(estimator):
    exported(LatestExporter("latest", exports_to_keep=None), estimator, *range(7))
    assert kept(estimator) == list(range(1, 8))


def test_j02_by_default_five_are_kept(estimator):
    exported(LatestExporter("latest"), estimator, *range(7))
    assert kept(estimator) == [3, 4, 5, 6, 7]


def test_j02_what_is_not_named_by_ten_digits_is_not_touched(tmp_path):
    mine = ("1700000001", "1700000002", "1700000003")
    others = ("170000000", "17000000001", "temp-1700000001", "notes", "1700000000x")
    for name in (*mine, *others):
        (tmp_path / name).mkdir()
    (tmp_path / "1600000000").write_text("a file")
    delete_old_exports(str(tmp_path), 1)
    assert {path.name for path in tmp_path.iterdir()} == {"1700000003", "1600000000", *others}


def test_j05_a_folder_that_is_gone_is_warned_of(tmp_path, caplog):
    delete_old_exports(str(tmp_path / "missing"), 1)
    assert not caplog.records
    delete_export(tmp_path / "1700000001")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"the old export {tmp_path / '1700000001'} cannot be deleted" in record.message


# --- at a URL


class UrlEstimator(FakeEstimator):
    """Makes its folders wherever model_dir is."""

    def export_model(self, export_path, serving_input_fn, checkpoint_path, assets_extra):
        self.now += 1
        storage_of(join(export_path, str(self.now))).replace("model.safetensors", b"")
        return join(export_path, str(self.now))


@pytest.mark.parametrize("url", ["file://{}", "memory://{}"])
def test_j02_j04_a_model_dir_may_be_a_url(tmp_path, url):
    estimator = UrlEstimator(url.format(tmp_path / "run"))
    with summary_writer(join(estimator.model_dir, "eval")) as writer:
        writer.scalar("loss", 50.0, 1)
    assert exported(BestExporter(), estimator, 100.0, 55.0, 49.0, path="best") == [True, False, True]
    assert all(exported(LatestExporter("latest", exports_to_keep=2), estimator, 5.0, 4.0, 3.0, path="latest"))
    assert exported(FinalExporter("final"), estimator, 5.0, path="final", final=True) == [True]
    for name, stamps in {"best": (1, 2), "latest": (4, 5), "final": (6,)}.items():
        there = storage_of(join(estimator.model_dir, name)).names()
        assert sorted(there) == [str(1_700_000_000 + stamp) for stamp in stamps]
