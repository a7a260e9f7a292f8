"""The messages of ``inference.GRPCInferenceService`` and ``grpc.health.v1.Health``.

Names, numbers and types are those of the Open Inference Protocol, version 2, with Triton's extensions for the repository,
statistics, configuration and system shared memory, and of the gRPC health checking protocol, version 1. Of the
configuration only the fields that this server fills in are here; others are empty for every client.
"""

from __future__ import annotations

from narrowcast.oip.datatypes import DATATYPES
from narrowcast.oip.schema import Schema

__all__ = ["HEALTH", "INFERENCE"]

#: In the order of their numbers, which the protocol's documents do not keep.
_CONFIG_TYPES = (
    *("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
    *("FP16", "FP32", "FP64", "BYTES", "BF16"),
)

_SERVER = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live:bool=1",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready:bool=1",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name:string=1 version:string=2 *extensions:string=3",
    "ModelReadyRequest": "name:string=1 version:string=2",
    "ModelReadyResponse": "ready:bool=1",
    "ModelMetadataRequest": "name:string=1 version:string=2",
    "ModelMetadataResponse": "name:string=1 *versions:string=2 platform:string=3 "
    "*inputs:ModelMetadataResponse.TensorMetadata=4 *outputs:ModelMetadataResponse.TensorMetadata=5",
    "ModelMetadataResponse.TensorMetadata": "name:string=1 datatype:string=2 *shape:int64=3",
}

_INFER = {
    "InferParameter": "|bool_param:bool=1 |int64_param:int64=2 |string_param:string=3 |double_param:double=4 "
    "|uint64_param:uint64=5",
    "InferTensorContents": "*bool_contents:bool=1 *int_contents:int32=2 *int64_contents:int64=3 "
    "*uint_contents:uint32=4 *uint64_contents:uint64=5 *fp32_contents:float=6 *fp64_contents:double=7 "
    "*bytes_contents:bytes=8",
    "ModelInferRequest": "model_name:string=1 model_version:string=2 id:string=3 %parameters:InferParameter=4 "
    "*inputs:ModelInferRequest.InferInputTensor=5 *outputs:ModelInferRequest.InferRequestedOutputTensor=6 "
    "*raw_input_contents:bytes=7",
    "ModelInferRequest.InferInputTensor": "name:string=1 datatype:string=2 *shape:int64=3 "
    "%parameters:InferParameter=4 contents:InferTensorContents=5",
    "ModelInferRequest.InferRequestedOutputTensor": "name:string=1 %parameters:InferParameter=2",
    "ModelInferResponse": "model_name:string=1 model_version:string=2 id:string=3 %parameters:InferParameter=4 "
    "*outputs:ModelInferResponse.InferOutputTensor=5 *raw_output_contents:bytes=6",
    "ModelInferResponse.InferOutputTensor": "name:string=1 datatype:string=2 *shape:int64=3 "
    "%parameters:InferParameter=4 contents:InferTensorContents=5",
    "ModelStreamInferResponse": "error_message:string=1 infer_response:ModelInferResponse=2",
}

_CONFIG = {
    "ModelConfigRequest": "name:string=1 version:string=2",
    "ModelConfigResponse": "config:ModelConfig=1",
    "ModelConfig": "name:string=1 platform:string=2 backend:string=17 version_policy:ModelVersionPolicy=3 "
    "max_batch_size:int32=4 *input:ModelInput=5 *output:ModelOutput=6 dynamic_batching:ModelDynamicBatching=11 "
    "*instance_group:ModelInstanceGroup=7",
    "ModelInput": "name:string=1 data_type:DataType=2 *dims:int64=4",
    "ModelOutput": "name:string=1 data_type:DataType=2 *dims:int64=3",
    "ModelInstanceGroup": "name:string=1 kind:ModelInstanceGroup.Kind=4 count:int32=2",
    "ModelDynamicBatching": "*preferred_batch_size:int32=1 max_queue_delay_microseconds:uint64=2 "
    "priority_levels:uint64=4 default_priority_level:uint64=5",
    "ModelVersionPolicy": "|latest:ModelVersionPolicy.Latest=1 |all:ModelVersionPolicy.All=2 "
    "|specific:ModelVersionPolicy.Specific=3",
    "ModelVersionPolicy.Latest": "num_versions:uint32=1",
    "ModelVersionPolicy.All": "",
    "ModelVersionPolicy.Specific": "*versions:int64=1",
}

_STATISTICS = {
    "ModelStatisticsRequest": "name:string=1 version:string=2",
    "ModelStatisticsResponse": "*model_stats:ModelStatistics=1",
    "ModelStatistics": "name:string=1 version:string=2 last_inference:uint64=3 inference_count:uint64=4 "
    "execution_count:uint64=5 inference_stats:InferStatistics=6 *batch_stats:InferBatchStatistics=7",
    "InferStatistics": "success:StatisticDuration=1 fail:StatisticDuration=2 queue:StatisticDuration=3 "
    "compute_input:StatisticDuration=4 compute_infer:StatisticDuration=5 compute_output:StatisticDuration=6 "
    "cache_hit:StatisticDuration=7 cache_miss:StatisticDuration=8",
    "InferBatchStatistics": "batch_size:uint64=1 compute_input:StatisticDuration=2 "
    "compute_infer:StatisticDuration=3 compute_output:StatisticDuration=4",
    "StatisticDuration": "count:uint64=1 ns:uint64=2",
}

_REPOSITORY = {
    "ModelRepositoryParameter": "|bool_param:bool=1 |int64_param:int64=2 |string_param:string=3 |bytes_param:bytes=4",
    "RepositoryIndexRequest": "repository_name:string=1 ready:bool=2",
    "RepositoryIndexResponse": "*models:RepositoryIndexResponse.ModelIndex=1",
    "RepositoryIndexResponse.ModelIndex": "name:string=1 version:string=2 state:string=3 reason:string=4",
    "RepositoryModelLoadRequest": "repository_name:string=1 model_name:string=2 %parameters:ModelRepositoryParameter=3",
    "RepositoryModelLoadResponse": "",
    "RepositoryModelUnloadRequest": "repository_name:string=1 model_name:string=2 "
    "%parameters:ModelRepositoryParameter=3",
    "RepositoryModelUnloadResponse": "",
}

_SHARED_MEMORY = {
    "SystemSharedMemoryStatusRequest": "name:string=1",
    "SystemSharedMemoryStatusResponse": "%regions:SystemSharedMemoryStatusResponse.RegionStatus=1",
    "SystemSharedMemoryStatusResponse.RegionStatus": "name:string=1 key:string=2 offset:uint64=3 byte_size:uint64=4",
    "SystemSharedMemoryRegisterRequest": "name:string=1 key:string=2 offset:uint64=3 byte_size:uint64=4",
    "SystemSharedMemoryRegisterResponse": "",
    "SystemSharedMemoryUnregisterRequest": "name:string=1",
    "SystemSharedMemoryUnregisterResponse": "",
}

INFERENCE = Schema(
    "inference",
    _SERVER | _INFER | _CONFIG | _STATISTICS | _REPOSITORY | _SHARED_MEMORY,
    {
        "DataType": ("TYPE_INVALID", *(DATATYPES[name].config for name in _CONFIG_TYPES)),
        "ModelInstanceGroup.Kind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"),
    },
)

HEALTH = Schema(
    "grpc.health.v1",
    {"HealthCheckRequest": "service:string=1", "HealthCheckResponse": "status:HealthCheckResponse.ServingStatus=1"},
    {"HealthCheckResponse.ServingStatus": ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")},
)
