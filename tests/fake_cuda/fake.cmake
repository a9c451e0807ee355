enable_language(CXX)
set(FAKE_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/fake)

# The runtime, cuBLASLt and NCCL: one for all modules of a process.
add_library(fake_runtime SHARED fake_cuda/fake_cuda.cpp fake_cuda/fake_blas.cpp fake_cuda/fake_nccl.cpp
  fake_cuda/emulation.cpp fake_cuda/hopper_emulation.cpp fake_cuda/hopper_shared.cpp fake_cuda/hopper_tma.cpp
  fake_cuda/hopper_wgmma.cpp)
set_source_files_properties(fake_cuda/hopper_wgmma.cpp PROPERTIES COMPILE_OPTIONS -O3)
target_link_libraries(fake_runtime PRIVATE PkgConfig::OPENBLAS Threads::Threads)
set_target_properties(fake_runtime PROPERTIES OUTPUT_NAME fake_cuda_runtime LIBRARY_OUTPUT_DIRECTORY ${FAKE_DIRECTORY})

# fake_module(TARGET NAME SOURCE...): libNAME.so.0.1 of C files and kernels, over the fake runtime.
function(fake_module target name)
  add_library(${target} MODULE ${ARGN})
  target_link_libraries(${target} PRIVATE fake_runtime Threads::Threads m)
  set_target_properties(${target} PROPERTIES PREFIX lib OUTPUT_NAME ${name} SUFFIX .so.0.1
    LIBRARY_OUTPUT_DIRECTORY ${FAKE_DIRECTORY} BUILD_RPATH "$ORIGIN")
endfunction()

fake_module(fake_cuda muonshard_cuda ${MUONSHARD_CUDA_HOST} ${MUONSHARD_CUDA_KERNELS})
target_include_directories(fake_cuda PRIVATE ${PROJECT_SOURCE_DIR}/src)
fake_module(fake_gpt_cuda muonshard_gpt_cuda ${GPT_CUDA_HOST} ${GPT_CUDA_KERNELS})
target_include_directories(fake_gpt_cuda PRIVATE ${PROJECT_SOURCE_DIR}/launch/gpt)

# The kernel of tiles by itself, each kind of what is asynchronous as late as may be, as early, and by chance.
set(TILE_KERNEL ${PROJECT_SOURCE_DIR}/src/kernels/cuda_tile_kernel.cu)
add_executable(test_tile_product test_tile_product.c ${TILE_KERNEL})
target_link_libraries(test_tile_product PRIVATE fake_runtime PkgConfig::CMOCKA m)
target_include_directories(test_tile_product PRIVATE ${PROJECT_SOURCE_DIR}/src)

set_source_files_properties(${MUONSHARD_CUDA_KERNELS} ${GPT_CUDA_KERNELS} PROPERTIES LANGUAGE CXX
  COMPILE_OPTIONS "-xc++;-Wno-unknown-pragmas;-Wno-psabi")
target_include_directories(fake_runtime PRIVATE ${PROJECT_SOURCE_DIR}/src)
foreach(target fake_runtime fake_cuda fake_gpt_cuda test_tile_product)
  target_compile_features(${target} PRIVATE cxx_std_17)
  target_compile_options(${target} PRIVATE -ffp-contract=off -O1)
  target_compile_definitions(${target} PRIVATE _POSIX_C_SOURCE=200809L)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/include ${CMAKE_CURRENT_SOURCE_DIR}/fake_cuda)
  target_include_directories(${target} SYSTEM PRIVATE ${CUDA_INCLUDE} ${NCCL_INCLUDE})
endforeach()

add_library(driver_fake SHARED ${CMAKE_CURRENT_BINARY_DIR}/nothing.c)
set_target_properties(driver_fake PROPERTIES OUTPUT_NAME cuda VERSION 1 SOVERSION 1
  LIBRARY_OUTPUT_DIRECTORY ${FAKE_DIRECTORY})

# The test NAME once more, on the fake; FAKE_CUDA_PROTECT=0: without faults, which cost much time.
function(fake_test name)
  cmake_parse_arguments(T "" "TEST;MPI" "ENVIRONMENT" ${ARGN})
  if(NOT T_TEST)
    set(T_TEST ${name}_fake_cuda)
  endif()
  set(command test_${name})
  if(T_MPI)
    set(command ${MPIEXEC_EXECUTABLE} --timeout 300 -n ${T_MPI} $<TARGET_FILE:test_${name}>)
  endif()
  add_test(NAME ${T_TEST} COMMAND ${command})
  set_tests_properties(${T_TEST} PROPERTIES TIMEOUT 600 LABELS fake ENVIRONMENT
    "OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1;OMPI_MCA_rmaps_base_oversubscribe=1;OMPI_MCA_hwloc_base_binding_policy=none;LD_LIBRARY_PATH=${CMAKE_CURRENT_BINARY_DIR}/fake;OPENBLAS_NUM_THREADS=1;MUONSHARD_TEST_BACKEND=cuda;FAKE_CUDA_DEVICES=4;${T_ENVIRONMENT}")
endfunction()

# The contract of the backend, and the optimizer's numbers: the host's own tests.
foreach(name elementwise backend_data matrix_update alignment orthogonalize_cases newton_schulz presets conventions step_rules)
  fake_test(${name})
endforeach()
foreach(seed 0 1 2)
  fake_test(tile_product TEST tile_product_fake_cuda_${seed} ENVIRONMENT "FAKE_HOPPER_SEED=${seed};FAKE_CUDA_PROTECT=0")
endforeach()
# Symmetric products by panels, which matrices as small as these aren't worth.
foreach(name orthogonalize_cases newton_schulz)
  fake_test(${name} TEST ${name}_panels_fake_cuda ENVIRONMENT MUONSHARD_TEST_PANELS=3)
endforeach()
# 16-bit products through the kernel of tiles, of those matrices whose sides are multiples of 8.
foreach(name orthogonalize_cases newton_schulz)
  fake_test(${name} TEST ${name}_tiles_fake_cuda ENVIRONMENT "MUONSHARD_TEST_TILES=1;FAKE_HOPPER_SEED=2")
endforeach()
foreach(name ranks ranks_bits ranks_errors numbers replicas trace)
  fake_test(${name} ENVIRONMENT FAKE_CUDA_PROTECT=0)
endforeach()
# What must not be read late, and what must not be read early.
fake_test(ranks_rules ENVIRONMENT FAKE_CUDA_PROTECT=0)
fake_test(checkpoint ENVIRONMENT FAKE_CUDA_PROTECT=0)
fake_test(checkpoint_errors ENVIRONMENT FAKE_CUDA_PROTECT=0)
fake_test(checkpoint_failures ENVIRONMENT FAKE_CUDA_PROTECT=0)
fake_test(trace TEST trace_staged_fake_cuda
  ENVIRONMENT "FAKE_CUDA_PROTECT=0;FAKE_CUDA_DEVICES=1;FAKE_NCCL_REFUSE=1;MUONSHARD_TEST_SHARE=1")
fake_test(ranks_rules TEST ranks_rules_early_fake_cuda ENVIRONMENT "FAKE_CUDA_PROTECT=0;FAKE_CUDA_SEED=3")

# Programs that make sense on a device only.
function(device_program name)
  add_executable(test_${name} test_${name}.c step_rig.c device_images.c ${ARGN})
  target_include_directories(test_${name} PRIVATE ${PROJECT_SOURCE_DIR}/src ${CMAKE_CURRENT_SOURCE_DIR})
  target_link_libraries(test_${name} PRIVATE muonshard_mpi_static muonshard_static PkgConfig::CMOCKA Threads::Threads
    muonshard_flags ${CMAKE_DL_LIBS})
endfunction()
foreach(name device device_errors device_tiles choices)
  device_program(${name} device_fixture.c ranks_fixture.c comm_threads.c)
  target_include_directories(test_${name} SYSTEM PRIVATE ${CUDA_INCLUDE} ${NCCL_INCLUDE})
endforeach()
fake_test(device)
fake_test(device_errors ENVIRONMENT FAKE_CUDA_PROTECT=0)
fake_test(choices ENVIRONMENT FAKE_CUDA_PROTECT=0)
fake_test(device_tiles ENVIRONMENT FAKE_CUDA_PROTECT=0)
device_program(comm_device comm_threads.c comm_contract.c)
fake_test(comm_device TEST comm_device_fake_cuda ENVIRONMENT FAKE_CUDA_PROTECT=0)
device_program(device_mpi)
foreach(n 1 2 4)
  fake_test(device_mpi TEST device_mpi_fake_cuda_np${n} MPI ${n} ENVIRONMENT FAKE_CUDA_PROTECT=0)
endforeach()
fake_test(device_mpi TEST device_shared_fake_cuda_np2 MPI 2
  ENVIRONMENT "FAKE_CUDA_PROTECT=0;FAKE_CUDA_DEVICES=1;MUONSHARD_TEST_SHARE=1")

# The GPT's layers on CUDA.
add_executable(test_gpt_device test_gpt_device.c)
target_link_libraries(test_gpt_device PRIVATE gpt PkgConfig::CMOCKA ${CMAKE_DL_LIBS} muonshard_flags)
add_test(NAME gpt_device COMMAND test_gpt_device)
set_tests_properties(gpt_device PROPERTIES TIMEOUT 300 LABELS fake
  ENVIRONMENT "LD_LIBRARY_PATH=${FAKE_DIRECTORY};OPENBLAS_NUM_THREADS=1")

add_test(NAME train_fake_cuda COMMAND bash ${CMAKE_CURRENT_SOURCE_DIR}/test_train_device.sh
  $<TARGET_FILE:muonshard_cmd> ${MPIEXEC_EXECUTABLE})
set_tests_properties(train_fake_cuda PROPERTIES TIMEOUT 300 LABELS fake ENVIRONMENT
  "OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1;OMPI_MCA_rmaps_base_oversubscribe=1;OMPI_MCA_hwloc_base_binding_policy=none;LD_LIBRARY_PATH=${FAKE_DIRECTORY};OPENBLAS_NUM_THREADS=1;FAKE_CUDA_DEVICES=4")

add_test(NAME check_fake_cuda COMMAND bash ${CMAKE_CURRENT_SOURCE_DIR}/test_check.sh
  $<TARGET_FILE:muonshard_cmd> ${MPIEXEC_EXECUTABLE} cuda)
set_tests_properties(check_fake_cuda PROPERTIES TIMEOUT 300 LABELS fake ENVIRONMENT
  "LD_LIBRARY_PATH=${FAKE_DIRECTORY};FAKE_CUDA_DEVICES=4;FAKE_CUDA_PROTECT=0")

# What is planned for a device, and steps, rates and links measured on one.
set(FAKE_COMMAND_ENVIRONMENT
  "OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1;OMPI_MCA_rmaps_base_oversubscribe=1;OMPI_MCA_hwloc_base_binding_policy=none;LD_LIBRARY_PATH=${FAKE_DIRECTORY};OPENBLAS_NUM_THREADS=1;FAKE_CUDA_DEVICES=4;FAKE_CUDA_PROTECT=0")
add_test(NAME memory_fake_cuda COMMAND bash ${CMAKE_CURRENT_SOURCE_DIR}/test_memory.sh
  $<TARGET_FILE:muonshard_cmd> ${MPIEXEC_EXECUTABLE} cuda 1 2)
set_tests_properties(memory_fake_cuda PROPERTIES TIMEOUT 300 LABELS fake ENVIRONMENT "${FAKE_COMMAND_ENVIRONMENT}")
add_test(NAME bench_fake_cuda COMMAND bash ${CMAKE_CURRENT_SOURCE_DIR}/test_bench_device.sh
  $<TARGET_FILE:muonshard_cmd> ${MPIEXEC_EXECUTABLE})
set_tests_properties(bench_fake_cuda PROPERTIES TIMEOUT 300 LABELS fake ENVIRONMENT "${FAKE_COMMAND_ENVIRONMENT}")

# ---- on a card: ctest -L gpu ----

function(gpu_test name)
  add_test(NAME ${name}_gpu COMMAND bash ${CMAKE_CURRENT_SOURCE_DIR}/gpu/or_skip.sh ${ARGN} $<TARGET_FILE:test_${name}>)
  set_tests_properties(${name}_gpu PROPERTIES TIMEOUT 600 LABELS gpu SKIP_RETURN_CODE 77 RUN_SERIAL TRUE ENVIRONMENT
    "LD_LIBRARY_PATH=${PROJECT_BINARY_DIR}:$ENV{LD_LIBRARY_PATH};OPENBLAS_NUM_THREADS=1;MUONSHARD_TEST_BACKEND=cuda")
endfunction()
foreach(name elementwise backend_data matrix_update alignment orthogonalize_cases newton_schulz presets conventions step_rules)
  gpu_test(${name})
endforeach()
foreach(name device_mpi comm_device gpt_device trace checkpoint)
  gpu_test(${name})
endforeach()
# What ranks are there are threads of one process.
set_property(TEST comm_device_gpu APPEND PROPERTY ENVIRONMENT MUONSHARD_TEST_RANKS=1)
set_property(TEST trace_gpu APPEND PROPERTY ENVIRONMENT MUONSHARD_TEST_SHARE=1)
# With other ranks a batch may take another kernel, and a card's kernels differ in their last bits.
set_property(TEST checkpoint_gpu APPEND PROPERTY ENVIRONMENT "MUONSHARD_TEST_SHARE=1;MUONSHARD_TEST_ONLY=same_ranks")
# The kernel of tiles as nvcc has it, and what the optimizer makes of it.
function(hopper_test name program)
  add_test(NAME ${name} COMMAND bash ${CMAKE_CURRENT_SOURCE_DIR}/gpu/or_skip.sh --sm 9.0 $<TARGET_FILE:${program}>)
  set_tests_properties(${name} PROPERTIES TIMEOUT 600 LABELS gpu SKIP_RETURN_CODE 77 RUN_SERIAL TRUE ENVIRONMENT
    "LD_LIBRARY_PATH=${PROJECT_BINARY_DIR}:$ENV{LD_LIBRARY_PATH};OPENBLAS_NUM_THREADS=1;MUONSHARD_TEST_BACKEND=cuda;MUONSHARD_TEST_TILES=1;MUONSHARD_TILE_REPEATS=50")
endfunction()
if(TARGET muonshard_cuda)
  add_executable(test_tile_product_card test_tile_product.c ${PROJECT_BINARY_DIR}/cuda_tile_kernel.cu.o)
  set_source_files_properties(${PROJECT_BINARY_DIR}/cuda_tile_kernel.cu.o PROPERTIES GENERATED TRUE EXTERNAL_OBJECT TRUE)
  add_dependencies(test_tile_product_card muonshard_cuda)
  target_include_directories(test_tile_product_card PRIVATE ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/include)
  target_include_directories(test_tile_product_card SYSTEM PRIVATE ${CUDA_INCLUDE})
  target_link_libraries(test_tile_product_card PRIVATE ${CUDA_cudart} PkgConfig::CMOCKA stdc++ m muonshard_flags)
  hopper_test(tile_product_gpu test_tile_product_card)
endif()
hopper_test(orthogonalize_cases_tiles_gpu test_orthogonalize_cases)
hopper_test(newton_schulz_tiles_gpu test_newton_schulz)
