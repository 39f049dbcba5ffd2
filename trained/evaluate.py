"""EleutherAI's lm-evaluation-harness on a trained model. The adapter is here; tasks, prompts and scores are theirs."""

import lm_eval
from datasets.exceptions import DatasetsError
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table as table

from rules import nearest
from trained.model import END_OF_TEXT, log_likelihoods

PAPER = "hellaswag", "arc_challenge", "winogrande", "mmlu", "piqa", "openbookqa", "lambada_openai"  # arXiv 2606.27715's


class Adapter(TemplateLM):
    """What lm_eval asks of a model."""
    eot_token_id = END_OF_TEXT

    def __init__(self, model, length: int, encoding):
        super().__init__()
        self.model, self.length, self.encoding = model, length, encoding

    def tok_encode(self, string: str, add_special_tokens=None, **kwargs) -> list[int]:
        return self.encoding.encode_ordinary(string)

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        return log_likelihoods(self.model, self.length, [pair for _, *pair in requests])

    def loglikelihood_rolling(self, requests, **kwargs) -> list[float]:
        pairs = [([END_OF_TEXT], self.tok_encode(*request.args)) for request in requests]
        return [p for p, _ in log_likelihoods(self.model, self.length, pairs)]

    def generate_until(self, requests, **kwargs) -> list[str]:
        raise ValueError(f"{requests[0].task_name} scores text that a model writes; only tasks of likelihoods run here")


def read_tasks(word: str, manager: TaskManager) -> list:
    """What a word names: a NAME that lm_eval knows; FILE.yaml, in its form; or NAME=FILE.jsonl, whose lines take the
    place of the data that the task would download."""
    name, _, file = word.partition("=")
    if name not in manager.all_tasks and not name.endswith(".yaml"):
        raise ValueError(f"lm_eval has no task {name!r}; the nearest is {nearest(name, manager.all_tasks)!r}")
    local = dict(task=name, task_alias=word, dataset_path="json", dataset_name=None, training_split=None,
                 dataset_kwargs=dict(data_files=dict(validation=file, test=file)))
    try:
        loaded = manager.load([dict(group=word, task=[local]) if file else name])
    except (OSError, DatasetsError, LookupError, TypeError, ValueError) as error:  # no network; other fields
        raise ValueError(f"{word}: {type(error).__name__}: {error}. A task's data come from the Hugging Face hub, over "
                         "the network, or, in the same form, from the FILE of NAME=FILE.jsonl") from None
    return [*loaded["groups"].values()][:not file] or [*loaded["tasks"].values()]


def scores(adapter: Adapter, words: list[str], shots: int, limit: int) -> dict:
    """What lm_eval.simple_evaluate returns. With -1 shots a task has its own number, with limit 0 all its questions."""
    manager = TaskManager()
    tasks = [task for word in words for name in (PAPER if word == "paper" else [word])
             for task in read_tasks(name, manager)]
    return lm_eval.simple_evaluate(adapter, tasks=tasks, num_fewshot=None if shots < 0 else shots, limit=limit or None,
                                   task_manager=manager, log_samples=False)
