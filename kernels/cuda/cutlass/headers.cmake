# cutlass_headers(variable python into given): where CUTLASS's headers are. A folder that was given is
# taken, or refused where it holds none; where none was, they come from PyPI. As a script,
# `cmake -DPYTHON=... -DINTO=... [-DDIRECTORY=...] -P headers.cmake` does the same.
set(cutlass_version 4.2.0.0)
set(cutlass_hash f9599ada45c7bcb6bf53f7d3f0a7d154183e53451c01bfa59eecd37dd4a693f6)

function(cutlass_headers variable python into given)
  if(given)
    if(NOT EXISTS "${given}/include/cutlass/cutlass.h")
      message(FATAL_ERROR "INTERNVL_RT_CUTLASS_DIR is '${given}', which has no "
                          "include/cutlass/cutlass.h")
    endif()
    set(${variable} "${given}/include" PARENT_SCOPE)
    return()
  endif()
  set(include "${into}/cutlass_library/source/include")
  if(NOT EXISTS "${include}/cutlass/cutlass.h")
    # pip hides itself from what it builds in isolation, through PYTHONPATH.
    execute_process(
      COMMAND ${CMAKE_COMMAND} -E env --unset=PYTHONPATH "${python}" -m pip download --quiet
              --disable-pip-version-check --no-deps --dest "${into}"
              nvidia-cutlass==${cutlass_version}
      RESULT_VARIABLE failed OUTPUT_QUIET ERROR_VARIABLE why)
    set(wheel "${into}/nvidia_cutlass-${cutlass_version}-py3-none-any.whl")
    if(failed OR NOT EXISTS "${wheel}")
      string(STRIP "${why}" why)
      string(REGEX REPLACE ".*\n" "" why "${why}")
      message(FATAL_ERROR "pip could not download nvidia-cutlass==${cutlass_version} (${why}); "
                          "-DINTERNVL_RT_CUTLASS_DIR=folder takes one with include/cutlass/cutlass.h")
    endif()
    file(SHA256 "${wheel}" hash)
    if(NOT hash STREQUAL cutlass_hash)
      message(FATAL_ERROR "${wheel} has the SHA-256 ${hash}, expected ${cutlass_hash}")
    endif()
    file(ARCHIVE_EXTRACT INPUT "${wheel}" DESTINATION "${into}"
         PATTERNS cutlass_library/source/include)
  endif()
  set(${variable} "${include}" PARENT_SCOPE)
endfunction()

if(CMAKE_SCRIPT_MODE_FILE STREQUAL CMAKE_CURRENT_LIST_FILE)
  cutlass_headers(found "${PYTHON}" "${INTO}" "${DIRECTORY}")
  message(STATUS "${found}")
endif()
