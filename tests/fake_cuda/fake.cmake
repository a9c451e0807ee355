enable_language(CXX)
add_library(fake_cuda MODULE ${MUONSHARD_CUDA_HOST} ${MUONSHARD_CUDA_KERNELS}
  fake_cuda/fake_cuda.cpp fake_cuda/fake_blas.cpp fake_cuda/fake_nccl.cpp fake_cuda/emulation.cpp)
set_source_files_properties(${MUONSHARD_CUDA_KERNELS} PROPERTIES LANGUAGE CXX
  COMPILE_OPTIONS "-xc++;-Wno-unknown-pragmas")
target_compile_features(fake_cuda PRIVATE cxx_std_17)
target_compile_options(fake_cuda PRIVATE -ffp-contract=off -O1)
target_compile_definitions(fake_cuda PRIVATE _POSIX_C_SOURCE=200809L)
target_include_directories(fake_cuda PRIVATE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src
  ${CMAKE_CURRENT_SOURCE_DIR}/fake_cuda)
target_include_directories(fake_cuda SYSTEM PRIVATE ${CUDA_INCLUDE} ${NCCL_INCLUDE})
target_link_libraries(fake_cuda PRIVATE PkgConfig::OPENBLAS Threads::Threads m)
set_target_properties(fake_cuda PROPERTIES PREFIX lib OUTPUT_NAME muonshard_cuda SUFFIX .so.0.1
  LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/fake)

# fake_test(NAME [ARGUMENT...]): the test's program once more, on the fake.
function(fake_test name)
  add_test(NAME ${name}_fake_cuda COMMAND test_${name} ${ARGN})
  set_tests_properties(${name}_fake_cuda PROPERTIES TIMEOUT 600 LABELS fake
    ENVIRONMENT "LD_LIBRARY_PATH=${CMAKE_CURRENT_BINARY_DIR}/fake;OPENBLAS_NUM_THREADS=1;MUONSHARD_TEST_BACKEND=cuda")
endfunction()

# The contract of the backend: the host's own tests.
foreach(name elementwise matrix_update orthogonalize_cases newton_schulz presets conventions step_rules)
  fake_test(${name})
endforeach()
