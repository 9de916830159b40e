"""The recipe for what an STN cannot tune runs, and chooses among its trials."""

import optuna

from recipes import outer_loop


def test_it_searches_learning_rates(capsys):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = outer_loop.main(["--trials", "2", "--epochs", "1"])
    rates = [trial.params["lr"] for trial in study.trials]
    low, high = outer_loop.LEARNING_RATES
    assert len(set(rates)) == 2
    assert all(low <= rate <= high for rate in rates)
    assert study.best_value == min(trial.value for trial in study.trials)
    assert study.trials[0].value != study.trials[1].value
    printed = capsys.readouterr().out
    assert f"best learning rate {study.best_params['lr']:.4g}" in printed
    assert "weight_decay" in printed
