# SPDX-License-Identifier: Apache-2.0
"""``latte distill``: a run that samples with its own steps, resumes, and refuses everything else."""

import json

import pytest

SMALL = ("--clips", 4, "--split", 2, "--train-steps", 2, "--batch", 2)


@pytest.fixture
def student(latte, run_folder, tmp_path):
    found = latte("distill", run_folder, "--steps", 4, *SMALL, "--out", tmp_path / "student", "--json")
    assert found.code == 0, found.err
    assert found.json["step"] == 2
    return tmp_path / "student"


def test_a_student_samples_with_its_steps_and_is_kept_by_conversion(latte, student, tmp_path):
    found = latte("sample", student, "--count", 2, "--out", tmp_path / "clips", "--json")
    assert found.code == 0, found.err
    facts = json.loads((tmp_path / "clips" / "clips.json").read_text())["facts"]
    assert (facts["sampler"], facts["steps"], facts["guidance"]) == ("euler", 4, 1.0)
    assert facts["weights"] == found.json["weights_sha256"]
    assert latte("convert", student, tmp_path / "weights", "--to", "latte").code == 0
    card = json.loads((tmp_path / "weights" / "config.json").read_text())
    assert card["distilled"]["steps"] == 4
    assert len(card["distilled"]["teacher"]) == 64
    for model in (student, tmp_path / "weights"):
        for words in (["--steps", 5], ["--quality", "fast"], ["--guidance", 2], ["--sampler", "dpmpp"]):
            found = latte("sample", model, *words, "--out", tmp_path / "other")
            assert found.code == 2
            assert "this model was distilled to euler with 4 steps, guidance" in found.errors[0]
            assert len(found.errors) == 1
    found = latte("convert", student, tmp_path / "official.pt", "--to", "official")
    assert found.code == 2
    assert "distilled to 4 steps" in found.errors[0]


def test_the_same_command_resumes_and_another_teacher_is_refused(latte, run_folder, student, tmp_path):
    times = {path: path.stat().st_mtime_ns for path in (student / "trajectories").iterdir()}
    words = ["distill", run_folder, *SMALL[:4], "--batch", 2, "--out", student]
    longer = latte(*words, "--train-steps", 3, "--json")
    assert (longer.code, longer.json["step"]) == (0, 3), longer.err
    assert "resuming from" in longer.err
    assert times == {path: path.stat().st_mtime_ns for path in (student / "trajectories").iterdir()}
    other = latte(*words, "--guidance", 3, "--train-steps", 3)
    assert other.code == 2
    assert "holds trajectories of" in other.errors[0]
    again = latte("distill", student, *SMALL, "--out", tmp_path / "again")
    assert again.code == 2
    assert "is distilled itself" in again.errors[0]
    trained = latte("train", student)
    assert trained.code == 2
    assert "Traceback" not in trained.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", 0], "distilled.steps must be at least 1"),
        (["--clips", 0], "--clips must be at least 1"),
        (["--split", 0], "--split must be at least 1"),
        (["--split", 400], "steps is 1600, but"),
        (["--guidance", 200], "distilled.guidance must be between 0 and 100"),
    ],
)
def test_wrong_settings_are_one_line(latte, run_folder, tmp_path, words, message):
    found = latte("distill", run_folder, *words, "--out", tmp_path / "out")
    assert found.code == 2
    assert message in found.errors[0]
    assert len(found.errors) == 1
    assert not (tmp_path / "out").exists()


def test_a_text_model_is_refused(latte, text_run_folder, tmp_path):
    found = latte("distill", text_run_folder, "--out", tmp_path / "out")
    assert found.code == 2
    assert len(found.errors) == 1
