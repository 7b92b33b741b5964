"""Greedy answers of a checkpoint and whether they are right."""

import json
import re

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.tiny_moe.conversations import Conversation

BATCH_REQUESTS = 40
MAX_NEW_TOKENS = 96


def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation]
) -> list[str]:
    """Generates an answer for each request, cut at the end of the turn."""
    tokenizer.padding_side = "left"
    answers: list[str] = []
    for start in range(0, len(conversations), BATCH_REQUESTS):
        prompts = [each.prompt() for each in conversations[start : start + BATCH_REQUESTS]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
            )
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return answers


def is_right(conversation: Conversation, answer: str) -> bool:
    """Tells if an answer holds the recorded number after ``Answer:``, or the recorded call with all its arguments."""
    if conversation.call is not None:
        match = re.fullmatch(r"\s*<tool_call>\s*(\{.*\})\s*</tool_call>\s*", answer, re.DOTALL)
        try:
            call = json.loads(match[1]) if match else None
        except json.JSONDecodeError:
            return False
        name, arguments = conversation.call
        return bool(call == {"name": name, "arguments": dict(arguments)})
    pattern = r"Answer: (\d+)"
    wanted, given = re.search(pattern, conversation.answer or ""), re.search(pattern, answer)
    return wanted is not None and given is not None and wanted[1] == given[1]
