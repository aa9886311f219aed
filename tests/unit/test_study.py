from benchmarks.studies import study
from ds_kd.evaluate.report.runs import Run


def test_the_figure_of_a_study_shows_every_setting_however_many_there_are(tmp_path):
    records = [
        {"step": step, "val_ce_loss": 3.0 / step, "val_kl_at_t1": 2.0 / step} for step in (1, 2)
    ]
    settings = [f"setting {k}" for k in range(9)]  # more than there are colours
    study.draw({name: {"1": Run(name, records, {}, "")} for name in settings}, tmp_path / "s.svg")
    drawn = (tmp_path / "s.svg").read_text()
    assert [name for name in settings if name not in drawn] == []
