"""Train a compressed NextItNet on the MovieLens-100K that comes with RecBole, and recommend.

    python examples/quickstart.py

Any RecBole option can be added, e.g. --epochs=5 or --ranks=[64,16,4].
"""

from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.trainer import Trainer
from recbole.utils import get_model, init_seed

import cprec_recbole  # noqa: F401  (registers CpNextItNet, CpSASRec and CpGRU4Rec)


def main() -> None:
    config = Config(
        model="CpNextItNet",
        dataset="ml-100k",
        config_dict={"epochs": 10, "ranks": [32, 16, 8], "sharing": "cross_block"},
    )
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train_data, valid_data, test_data = data_preparation(config, dataset)
    model = get_model(config["model"])(config, train_data._dataset)

    trainer = Trainer(config, model)
    trainer.fit(train_data, valid_data, show_progress=False)
    print("test:", dict(trainer.evaluate(test_data)))

    # films by their MovieLens ids: Star Wars, The Empire Strikes Back, Raiders of the Lost Ark
    history = dataset.token2id("item_id", ["50", "172", "174"])
    best = model.recommend(history, k=5, exclude_seen=True)
    print("recommended films:", list(dataset.id2token("item_id", best.items[0])))


if __name__ == "__main__":
    main()
