# cmake -DNM=nm -DOBJECTS="a.o;b.o" -P check_symbols.cmake
# Fails when an object file compiled for one instruction set defines a weak symbol.
foreach(object ${OBJECTS})
  execute_process(COMMAND ${NM} -C --defined-only ${object} OUTPUT_VARIABLE symbols
                  COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCH "[0-9a-f]+ [WVu] [^\n]+" weak "${symbols}")
  if(weak)
    message(FATAL_ERROR "${object}: weak symbol '${weak}': use no templates or inline functions "
                        "with external linkage in a file compiled per instruction set")
  endif()
endforeach()
