"""What the pack registers."""

from .compat import ComfyExtension, io, quick


class LiveDiffusionExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .coherence import LiveFutureAttention, LiveMemory
        from .compiled import LiveCompile
        from .compiled_vae import LiveCompileVAE
        from .conditioning import LivePromptBlend
        from .flow import LiveFlowNoise
        from .frames import LiveDecode, LiveEncode, LiveSimilarityFilter
        from .keep import LiveKeep, LiveLast
        from .learning import LiveLearnedSteps, LiveSearchedSteps
        from .live import LiveCamera, LiveRun, LiveView, connect
        from .models import LiveDemoModel
        from .patchwork import LivePatchwork
        from .ranges import checked
        from .reuse import LiveReuse
        from .sampling import LivePFDiff, LiveRCFGGuider, LiveStreamBatch, LiveStreamSampler
        from .schedules import LiveOptimizedSteps, LiveStrength, LiveTimesteps
        from .send import LiveSend
        from .tensorrt import LiveTensorRTBuild, LiveTensorRTLoader

        connect()
        nodes = [
            LiveCamera,
            LiveView,
            LiveSend,
            LiveStreamSampler,
            LiveStreamBatch,
            LiveFlowNoise,
            LiveRCFGGuider,
            LivePFDiff,
            LivePromptBlend,
            LiveTimesteps,
            LiveStrength,
            LiveOptimizedSteps,
            LiveLearnedSteps,
            LiveSearchedSteps,
            LiveSimilarityFilter,
            LiveKeep,
            LiveLast,
            LiveEncode,
            LiveDecode,
            LiveDemoModel,
            LiveFutureAttention,
            LiveMemory,
            LiveReuse,
            LivePatchwork,
            LiveCompile,
            LiveCompileVAE,
            LiveTensorRTBuild,
            LiveTensorRTLoader,
            LiveRun,
        ]
        return [quick(checked(node)) for node in nodes]
