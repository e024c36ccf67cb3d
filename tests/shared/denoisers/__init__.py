"""Small randomly initialised denoisers of diffusers with the arguments that their own pipelines pass."""

from denoisers.images import IMAGES
from denoisers.latents import LATENTS
from denoisers.table import Denoiser, prediction
from denoisers.unets import UNETS
from denoisers.videos import VIDEOS

# Left out, of the models of diffusers 0.42 with a time argument:
# - parts of others: TransformerTemporalModel, DreamLiteTransformer2DModel, all ControlNets and adapters;
# - no time in the call: UVit2DModel;
# - two times, or one for each modality: UniDiffuserModel, RFD4ProteinaTransformer, MiniMaxH3Transformer3DModel,
#   Cosmos3OmniTransformer (whose batch is one packed sequence);
# - a cache that one call hands to the next: AnyFlowFARTransformer3DModel, WanAnimate2Transformer3DModel,
#   SanaWMLTX2RefinerTransformer3DModel;
# - sparse attention that needs a compiler: Kandinsky6SRTransformer3DModel;
# - sizes or conditions too many for a small example: WanAnimateTransformer3DModel, SanaWMTransformer3DModel,
#   JoyImageEditPlusTransformer3DModel, BriaFibo2Transformer2DModel.
DENOISERS: tuple[Denoiser, ...] = (*UNETS, *IMAGES, *VIDEOS, *LATENTS)

__all__ = ["DENOISERS", "Denoiser", "prediction"]
