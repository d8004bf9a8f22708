"""transformers' Qwen2-VL on the CPU, for the parity tests (needs the parity extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

FloatArray = NDArray[np.float32]
ImageArray = NDArray[np.uint8]


class Reference:
    def __init__(self, folder: Path, dtype: str = "float32"):
        self.dtype = getattr(torch, dtype)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(
            folder, dtype=self.dtype, attn_implementation="eager"
        ).eval()

    def preprocess(self, images: Sequence[ImageArray]) -> tuple[torch.Tensor, torch.Tensor]:
        """pixel_values [patches of all images, 1176] and image_grid_thw [images, 3]."""
        batch = self.processor([Image.fromarray(image) for image in images], return_tensors="pt")
        return batch["pixel_values"], batch["image_grid_thw"]

    @torch.inference_mode()
    def encode_image(self, image: ImageArray) -> FloatArray:
        """[merged patches, hidden_size]"""
        pixel_values, grid = self.preprocess([image])
        return self.model.model.visual(pixel_values, grid_thw=grid).pooler_output.numpy()

    def preprocess_clip(self, frames: ImageArray) -> torch.Tensor:
        """[patches, 1176] of frames [n, h, w, 3], n even, not resized: patches of two frames, each as those
        of a picture. (transformers' own video processor needs torchvision.)"""
        pairs = []
        for i in range(0, len(frames), 2):
            two = [
                self.processor([Image.fromarray(frame)], return_tensors="pt", do_resize=False)["pixel_values"]
                for frame in frames[i : i + 2]
            ]
            first, second = (patches.view(len(patches), 3, 2, -1) for patches in two)
            pairs.append(torch.stack([first[:, :, 0], second[:, :, 0]], 2).flatten(1))
        return torch.cat(pairs)

    @torch.inference_mode()
    def logits(
        self,
        token_ids: Sequence[int],
        images: Sequence[ImageArray] = (),
        clips: Sequence[ImageArray] = (),
        position_ids: NDArray[np.int64] | None = None,
    ) -> FloatArray:
        """[len(token_ids), vocab_size]; clips as of preprocess_clip."""
        ids = torch.tensor([list(token_ids)])
        inputs = {}
        if images:
            pixel_values, inputs["image_grid_thw"] = self.preprocess(images)
            inputs["pixel_values"] = pixel_values.to(self.dtype)
        if clips:
            inputs["pixel_values_videos"] = torch.cat([self.preprocess_clip(c) for c in clips]).to(self.dtype)
            grids = [(len(c) // 2, c.shape[1] // 14, c.shape[2] // 14) for c in clips]
            inputs["video_grid_thw"] = torch.tensor(grids)
        if position_ids is not None:
            inputs["position_ids"] = torch.from_numpy(position_ids)[:, None]
        output = self.model(input_ids=ids, mm_token_type_ids=self.token_types(ids), use_cache=False, **inputs)
        return output.logits[0].float().numpy()

    def position_ids(
        self, token_ids: Sequence[int], grids: Sequence[tuple[str, tuple[int, int, int]]]
    ) -> NDArray[np.int64]:
        """[3, len(token_ids)]; grids as ("image" | "video", (t, h, w)) in their order."""
        ids = torch.tensor([list(token_ids)])
        by_kind = {
            kind: torch.tensor([grid for k, grid in grids if k == kind])
            if any(k == kind for k, _ in grids)
            else None
            for kind in ("image", "video")
        }
        positions, _ = self.model.model.get_rope_index(
            ids,
            mm_token_type_ids=self.token_types(ids),
            image_grid_thw=by_kind["image"],
            video_grid_thw=by_kind["video"],
        )
        return positions[:, 0].numpy()

    def token_types(self, ids: torch.Tensor) -> torch.Tensor:
        """0 for text, 1 for image pads, 2 for video pads."""
        config = self.model.config
        return (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
