"""Write llava.npz: logits and greedy tokens of transformers' LLaVA (5.24) under drawn weights, for test_llava.py.

python tests/references/make_llava_logits.py
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "support"))
from drawn_weights import draw, draw_image  # noqa: E402

TOKENS = np.array([[1, 5, 98, 98, 98, 98, 7, 9, 11, 60]])


def main():
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14
    )
    text = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=98, image_seq_length=4)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    pixels = torch.from_numpy(np.moveaxis(draw_image((28, 28)), -1, 1).copy())
    with torch.no_grad():
        for name, value in model.state_dict().items():
            name = name.replace("vision_tower.vision_model.", "vision_tower.")
            value.copy_(torch.from_numpy(draw(name, tuple(value.shape))))
        logits = model(input_ids=torch.from_numpy(TOKENS), pixel_values=pixels).logits.numpy()
        model.generation_config.eos_token_id = None
        said = model.generate(input_ids=torch.from_numpy(TOKENS), pixel_values=pixels, max_new_tokens=6,
                              do_sample=False, pad_token_id=0).numpy()[:, TOKENS.shape[1] :]  # fmt: skip
    np.savez_compressed(HERE / "llava.npz", tokens=TOKENS, logits=logits, said=said)


if __name__ == "__main__":
    main()
