"""Model: how the zoo's memory matrix begins."""

from __future__ import annotations

import torch
from torch import Tensor

from evomem.models.architectures.memory_matrix import MemoryMatrix

SHARP = 15.0
"""Logit of a row that matches a read key, beside rows that do not (about 0)."""
EMPTY, HASH = 40.0, 8.0
"""Logit of a slot that nothing was written into; deviation of the logits by which a key chooses among those."""
STORED = 6.0
"""Logit of the gate at a pair, and its negative elsewhere."""
ROLE = 0.7
"""Length of what the words that are keys, and those that are values, have in common."""
ADDRESS = 8
"""Numbers of a row that say which slot it is; they are never written."""


def begin_as_pairs(model: MemoryMatrix, keys_and_values: tuple[Tensor, Tensor]) -> None:
    """Let the memories begin as stores of pairs: a key and the value after it.

    The words that are keys have a direction in common, those that are values another one; where one follows the other,
    the gate stores. A row has a code of the key, a code of the value, numbers by which slots differ, and one that says
    that the slot is empty. A write goes to an empty slot, chosen by the key; a read looks for the code of the token
    that it stands on, and half of the attention heads copy the value to where the output reads it. A random start would
    have to find all of this; everything is trained.

    keys_and_values : ids of the words that are keys, and of those that are values.
    """
    config = model.config
    width, code = config.hidden_size, config.hidden_size // config.num_attention_heads
    spare = config.matrix_width - 2 * code - ADDRESS - 1
    keys, values = slice(0, code), slice(code, 2 * code)
    address, flag = slice(2 * code, 2 * code + ADDRESS), 2 * code + ADDRESS
    tokens, rest = torch.nn.init.orthogonal_(torch.empty(width, width)).split((width // 2, width // 2))
    copies, roles = rest[:code], rest[code : code + 2]
    as_key, as_value = (torch.nn.init.orthogonal_(torch.empty(code, width // 2)) @ tokens for _ in range(2))
    words, head = model.embed.weight, model.lm_head.weight
    words.copy_(torch.randn(len(words), width // 2) / (width // 2) ** 0.5 @ tokens)
    head.copy_(words @ as_value.T @ copies * 2**0.5)
    for ids, role in zip(keys_and_values, roles, strict=True):
        words[ids] += ROLE * role
    shown = ROLE * (width / (1 + ROLE**2)) ** 0.5  # a role after the norm
    unit = (2 * (1 + ROLE**2) / width) ** 0.5  # makes codes of length 1 of tokens after the norm
    for block in model.blocks:
        block.down.weight.zero_()  # the noise of what has nothing to say yet would drown the codes
        attention = block.attention
        attention.o_proj.weight.mul_(0.1)
        memory = attention.memory
        if memory is None:
            continue
        now, before = slice(0, width), slice(width, 2 * width)
        for layer in (memory.write_key, memory.write_value, memory.read_key, memory.store):
            layer.weight.mul_(0.1)
        memory.initial.zero_()
        memory.initial[:, :, address] = torch.randn(config.matrix_slots, ADDRESS)
        memory.initial[:, :, flag] = 1.0
        memory.write_value.weight[keys, before] = unit * as_key
        memory.write_value.weight[values, now] = unit * as_value
        memory.write_value.weight[2 * code :] = 0
        memory.write_key.weight[address, before] = HASH / ADDRESS**0.5 * unit * torch.randn(ADDRESS, code) @ as_key
        memory.write_key.bias[flag] = EMPTY
        memory.read_key.weight[keys, now] = SHARP * unit * as_key
        memory.store.bias.fill_(-STORED)
        memory.store.weight[:, before] += STORED / shown * roles[0]
        memory.store.weight[:, now] += STORED / shown * roles[1]
        memory.erase.bias.fill_(4.0)
        memory.erase.bias[address] = -6.0
        if spare:
            memory.erase.bias[-spare:] = -6.0
        # Attention divides by the root of a head's size; half of the product's length goes into either factor.
        root = (SHARP * code**0.5) ** 0.5
        for number in range(config.num_attention_heads // 2):
            rows = slice(number * code, (number + 1) * code)
            attention.q_proj.weight[rows] = root * unit * as_key
            attention.row_key[0, number, keys] = root * torch.eye(code)
            attention.row_value[0, number, values] = torch.eye(code)
            attention.o_proj.weight[:, rows] = copies.T
