"""Train RecBole's own GRU4Rec, then compress it, and see what that cost and saved.

    python examples/compress_trained.py

Any RecBole option can be added, e.g. --epochs=5.
"""

from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.trainer import Trainer
from recbole.utils import get_model, init_seed

from cprec_recbole import compress
from cprec_recbole.costs import part_sizes


def main() -> None:
    config = Config(
        model="GRU4Rec",
        dataset="ml-100k",
        config_dict={"epochs": 3, "metrics": ["NDCG"], "topk": 20, "valid_metric": "NDCG@20"},
    )
    init_seed(config["seed"], config["reproducibility"])
    train_data, valid_data, test_data = data_preparation(config, create_dataset(config))
    model = get_model(config["model"])(config, train_data._dataset)
    Trainer(config, model).fit(train_data, valid_data, show_progress=False)

    small = compress(model, ranks=[64, 16, 4], sharing="none")  # `model` is left as it was
    for name, each in (("original", model), ("compressed", small)):
        metrics = Trainer(config, each).evaluate(test_data, load_best_model=False)
        print(f"{name}: {part_sizes(each).total:,} parameters, test {dict(metrics)}")

    trainer = Trainer(config, small)  # one more epoch, as any RecBole model is trained
    trainer.epochs = 1
    trainer.fit(train_data, valid_data, show_progress=False)
    print("after one epoch:", dict(trainer.evaluate(test_data)))


if __name__ == "__main__":
    main()
