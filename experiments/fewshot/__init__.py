"""Few-shot learning: a learner trained on episodes of some classes, judged on episodes of others."""

from experiments.fewshot.experiment import FewShot as FewShot
