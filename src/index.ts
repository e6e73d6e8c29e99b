/**
 * fewbit: quantized neural-network inference. A device runs graphs; a model is a graph with weights and a tokenizer.
 *
 * @example
 * await using device = await open();
 * using model = await loadModel("models/fewbit-tiny", { device, quantize: "int4wo-64" });
 * for await (const { text } of model.generate("It was a dark night", { maxTokens: 64 })) process.stdout.write(text);
 */

export type { Capabilities, DeviceInfo, Executable, ExecutableStatistics, WeightSource } from "./backends/backend.js";
export type { AdapterPreference } from "./backends/webgpu/adapter.js";
export type { DType, FloatType, TypedArray } from "./core/dtype.js";
export { type ErrorCode, type ErrorContext, FewbitError } from "./core/errors.js";
export { type Block, bitsPerElement, type Codec, type Format, formatKey, withScale } from "./formats/format.js";
export { CODECS, FORMATS, type FormatName } from "./formats/table.js";
export type { QuantizedTensor } from "./formats/tensor.js";
export type { ChunkStore, DownloadProgress } from "./io/cache.js";
export type { ModelFolder, ModelFolderOptions } from "./io/model-folder.js";
export type { MemoryInput } from "./io/source.js";
export type { Symbols } from "./ir/evaluate.js";
export { type Dim, dense, type Graph, GraphBuilder, stored, type TensorType, type ValueId } from "./ir/graph.js";
export type { BinaryFn, OpAttrs, OpName, UnaryFn } from "./ir/ops.js";
export type { LogitSettings, SampleSettings } from "./ir/sample.js";
export type { DenseTensor, HostTensor, TensorRows } from "./ir/tensor.js";
export { type AttentionMode, applyLowPrecisionAttention } from "./models/attention.js";
export {
  AUTOQUANT_CANDIDATES,
  type AutoquantOptions,
  type AutoquantPlan,
  autoquant,
  parseAutoquantPlan,
} from "./models/autoquant.js";
export {
  CALIBRATION_ALGORITHMS,
  type CalibrateOptions,
  type CalibrateProgress,
  type CalibrationAlgorithm,
  calibrate,
} from "./models/calibrate.js";
export type { CalibrationStore } from "./models/calibration-store.js";
export { Chat, type ChatTemplateOptions, openChatTemplate } from "./models/chat.js";
export type { DecoderConfig, ExpertConfig, LayerConfig, RopeConfig, RopeScaling } from "./models/config.js";
export {
  type EvaluateOptions,
  evaluatePerplexity,
  type Perplexity,
  textWindows,
  type Window,
  type WindowLoss,
  windowLoss,
} from "./models/evaluate.js";
export {
  type BlockCopy,
  copyBlocks,
  KV_FORMATS,
  KvPool,
  type KvSequence,
  kvBytes,
  kvFormat,
} from "./models/kvcache.js";
export type { LoadModelOptions, LoadProgress } from "./models/load.js";
export {
  type FinishReason,
  type GeneratedToken,
  type GenerateOptions,
  type GenerateStatistics,
  loadModel,
  Model,
} from "./models/model.js";
export { type Outline, type OutlineOptions, outlineModel } from "./models/outline.js";
export { type SaveOptions, type SaveProgress, type SaveReport, saveQuantized } from "./models/save.js";
export type { Bucket, Plan, PlanOptions } from "./plan/plan.js";
export type { Explanation, Rejection } from "./plan/select.js";
export {
  codebookWeightOnly,
  float8DynamicActivationFloat8Weight,
  float8DynamicActivationInt4Weight,
  float8WeightOnly,
  fpxWeightOnly,
  type Granularity,
  int4WeightOnly,
  int8DynamicActivationInt4Weight,
  int8DynamicActivationInt8Weight,
  int8DynamicActivationIntxWeight,
  int8DynamicActivationUintxWeight,
  int8WeightOnly,
  intxWeightOnly,
  mxDynamicActivationMxWeight,
  mxWeightOnly,
  nf4WeightOnly,
  nvfp4DynamicActivationNvfp4Weight,
  nvfp4WeightOnly,
  perAxis,
  perBlock,
  perGroup,
  perRow,
  perTensor,
  prototypeInt4WeightOnly,
  type QuantizeConfig,
  uintxWeightOnly,
} from "./quantize/configs.js";
export { ACCURACY_NAMES, listQuantizeNames, parseQuantizeName } from "./quantize/names.js";
export {
  type BackendName,
  type CompileOptions,
  Device,
  type OpenOptions,
  open,
  Program,
  type RunOptions,
} from "./runtime/device.js";
export {
  dequantize,
  type Parameter,
  type QuantizedModel,
  type QuantizeTensorOptions,
  quantize,
  quantizeModel,
} from "./runtime/quantize.js";
export { CHAT_TEMPLATES, type ChatMessage, type ChatTemplate } from "./text/chat.js";
export type { Tokenizer } from "./text/tokenizer.js";
