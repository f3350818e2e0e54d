"""A stand-in for the parts of Axolotl that replay uses, for where Axolotl is not installed.

It follows the published plugin interface in our own words. A plugin is named by a dotted path, is told of the config,
extends its schema, names a trainer class (the first answer counts) and callbacks. The trainer has three arguments more
than its parent, fixes `max_steps` beforehand, asks any training set for its `column_names`, and may draw batches.
"""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import Trainer


class BasePlugin:
    def register(self, cfg):
        pass

    def get_input_args(self):
        return None

    def get_trainer_cls(self, cfg):
        return None

    def add_callbacks_post_trainer(self, cfg, trainer):
        return []


class PluginManager:
    _instance = None

    def __init__(self):
        self.plugins = {}

    @classmethod
    def get_instance(cls):
        cls._instance = cls._instance or cls()
        return cls._instance

    def register(self, name):
        module, plugin = name.rsplit(".", 1)
        self.plugins[name] = getattr(importlib.import_module(module), plugin)()

    def get_trainer_cls(self, cfg):
        answers = (plugin.get_trainer_cls(cfg) for plugin in self.plugins.values())
        return next((answer for answer in answers if answer is not None), None)


class AxolotlTrainer(Trainer):
    def __init__(self, *args, bench_data_collator=None, eval_data_collator=None, dataset_tags=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.packs = getattr(self.args, "sample_packing", False)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.packs:
            return BatchSampler(SequentialSampler(dataset), self.args.per_device_train_batch_size, drop_last=True)
        return super()._get_train_sampler(dataset)

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, is_training=False, **kwargs):
        assert "length" not in (dataset.column_names or [])
        sampler = sampler_fn(dataset) if sampler_fn else None
        drawn = {"batch_sampler": sampler} if self.packs else {"sampler": sampler, "batch_size": batch_size}
        return self.accelerator.prepare(DataLoader(dataset, collate_fn=self.data_collator, **drawn))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def get_cls_from_module_str(name):
    module, cls = name.rsplit(".", 1)
    return getattr(importlib.import_module(module), cls)


def build_trainer(manager, cfg, **given):
    """What Axolotl's builder does with the class: asks for its bases, passes its fixed arguments, adds callbacks."""
    cls = manager.get_trainer_cls(cfg) or AxolotlTrainer
    assert "processing_class" in inspect.signature(cls).parameters or issubclass(cls, Trainer)
    trainer = cls(callbacks=[], bench_data_collator=None, eval_data_collator=None, dataset_tags=[], **given)
    for plugin in manager.plugins.values():
        for callback in plugin.add_callbacks_post_trainer(cfg, trainer):
            trainer.add_callback(callback)
    return trainer


def modules():
    """The stand-in under Axolotl's names, for `sys.modules`."""
    contents = {
        "axolotl.integrations.base": (BasePlugin, PluginManager),
        "axolotl.core.trainers.base": (AxolotlTrainer,),
        "axolotl.utils.import_helper": (get_cls_from_module_str,),
    }
    parents = ("axolotl", "axolotl.integrations", "axolotl.core", "axolotl.core.trainers", "axolotl.utils")
    made = {name: ModuleType(name) for name in (*parents, *contents)}
    for name, things in contents.items():
        vars(made[name]).update({thing.__name__: thing for thing in things})
    return made
