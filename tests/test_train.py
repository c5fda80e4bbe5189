"""The whole road through the public command."""

import json


def test_a_run_leaves_its_figures_in_one_file(train, charlm, tmp_path, text_file):
    ended = train("data=text", f"data.path={text_file}", "trainer.max_steps=60", "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "finished"
    assert results["steps"] == 60
    assert ended.err == ""
