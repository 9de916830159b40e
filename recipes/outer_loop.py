"""Choose the learning rate in an outer loop, by Optuna, while every run tunes the rest by itself.

A learning rate does not change which weights are best, only how they are reached, so an STN has no
gradient for it. Each trial is one run of the quick start.

    python -m recipes.outer_loop --trials 8 --epochs 30
"""

import argparse

import optuna

from recipes.quickstart import load, train

LEARNING_RATES = (1e-3, 0.3)


def main(arguments: list[str] | None = None) -> optuna.Study:
    """Search and print the best learning rate, its validation loss and the values found with it."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    data = load(options.seed)

    def validation_loss(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", *LEARNING_RATES, log=True)
        run = train(
            data, method="delta", dropout=0.1, epochs=options.epochs, seed=options.seed, lr=lr
        )
        trial.set_user_attr("values", run.values)
        return run.valid_loss

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=options.seed))
    study.optimize(validation_loss, n_trials=options.trials)
    print(f"best learning rate {study.best_params['lr']:.4g}: loss {study.best_value:.4f}")
    for name, value in study.best_trial.user_attrs["values"].items():
        print(f"{name:24}{value:.4g}")
    return study


if __name__ == "__main__":
    main()
