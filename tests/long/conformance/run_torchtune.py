"""torchtune: its checkpointer and builders (llama3, llama3_2), with its scaled rotary module put in where needed."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from serving import read_config, serve, torch_gradient
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import local_kv_cache
from torchtune.training import MODEL_KEY, FullModelHFCheckpointer, set_default_dtype

INSTALL = ("pip install torchtune==0.6.1", "pip install --no-deps torchao==0.10.0")


def load(folder: Path, dtype: str) -> Any:
    stated = read_config(folder, ("llama3",), head_dim=False)
    rope = stated["rope"]
    with tempfile.TemporaryDirectory() as output:
        checkpointer = FullModelHFCheckpointer(str(folder), ["model.safetensors"], "LLAMA3", output)
        weights = checkpointer.load_checkpoint()[MODEL_KEY]
    with set_default_dtype(getattr(torch, dtype)):
        model = (partial(llama3_2, scale_factor=1) if stated["tie_word_embeddings"] else llama3)(
            vocab_size=stated["vocab_size"], num_layers=stated["num_hidden_layers"],
            num_heads=stated["num_attention_heads"], num_kv_heads=stated["num_key_value_heads"],
            embed_dim=stated["hidden_size"], max_seq_len=stated["max_position_embeddings"],
            rope_base=rope["rope_theta"], intermediate_dim=stated["intermediate_size"], norm_eps=stated["rms_norm_eps"],
        )  # fmt: skip
        if rope["rope_type"] == "llama3":  # of which the builders take the factor alone
            rotary = Llama3ScaledRoPE(
                stated["head_dim"], stated["max_position_embeddings"], rope["rope_theta"], rope["factor"],
                rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"],
            )  # fmt: skip
            for layer in model.layers:
                layer.attn.pos_embeddings = rotary
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Any:
    return model(torch.tensor([ids]))


@torch.no_grad()
def decode(model: Any, ids: list[int]) -> Any:
    rows, length = list[Any](), len(ids)
    mask = torch.ones(1, length, length, dtype=torch.bool).tril()
    about = {"device": torch.device("cpu"), "dtype": model.tok_embeddings.weight.dtype}
    with local_kv_cache(model, batch_size=1, decoder_max_seq_len=length, **about):
        for i, token in enumerate(ids):
            rows.append(model(torch.tensor([[token]]), mask=mask[:, i, None], input_pos=torch.tensor([[i]]))[0])
    return torch.cat(rows)


def gradient(model: Any, ids: list[int]) -> Any:
    return torch_gradient(model(torch.tensor([ids]))[0], ids, model.tok_embeddings.weight)


if __name__ == "__main__":
    serve("torchtune", load, logits, decode, gradient)
