enable_language(CXX)
set(FAKE_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/fake)

# The runtime, cuBLASLt and NCCL: one for all modules of a process.
add_library(fake_runtime SHARED fake_cuda/fake_cuda.cpp fake_cuda/fake_blas.cpp fake_cuda/fake_nccl.cpp
  fake_cuda/emulation.cpp)
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

set_source_files_properties(${MUONSHARD_CUDA_KERNELS} ${GPT_CUDA_KERNELS} PROPERTIES LANGUAGE CXX
  COMPILE_OPTIONS "-xc++;-Wno-unknown-pragmas")
target_include_directories(fake_runtime PRIVATE ${PROJECT_SOURCE_DIR}/src)
foreach(target fake_runtime fake_cuda fake_gpt_cuda)
  target_compile_features(${target} PRIVATE cxx_std_17)
  target_compile_options(${target} PRIVATE -ffp-contract=off -O1)
  target_compile_definitions(${target} PRIVATE _POSIX_C_SOURCE=200809L)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/include ${CMAKE_CURRENT_SOURCE_DIR}/fake_cuda)
  target_include_directories(${target} SYSTEM PRIVATE ${CUDA_INCLUDE} ${NCCL_INCLUDE})
endforeach()

# fake_test(NAME [ARGUMENT...]): the test's program once more, on the fake.
function(fake_test name)
  add_test(NAME ${name}_fake_cuda COMMAND test_${name} ${ARGN})
  set_tests_properties(${name}_fake_cuda PROPERTIES TIMEOUT 600 LABELS fake
    ENVIRONMENT "LD_LIBRARY_PATH=${FAKE_DIRECTORY};OPENBLAS_NUM_THREADS=1;MUONSHARD_TEST_BACKEND=cuda")
endfunction()

# The contract of the backend: the host's own tests.
foreach(name elementwise matrix_update orthogonalize_cases newton_schulz)
  fake_test(${name})
endforeach()

# The GPT's layers on CUDA.
add_executable(test_gpt_device test_gpt_device.c)
target_link_libraries(test_gpt_device PRIVATE gpt PkgConfig::CMOCKA ${CMAKE_DL_LIBS} muonshard_flags)
add_test(NAME gpt_device COMMAND test_gpt_device)
set_tests_properties(gpt_device PROPERTIES TIMEOUT 300 LABELS fake
  ENVIRONMENT "LD_LIBRARY_PATH=${FAKE_DIRECTORY};OPENBLAS_NUM_THREADS=1")
