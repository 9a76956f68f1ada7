//! Compiler messages for incorrect tasks.

#[test]
fn incorrect_tasks_have_understandable_messages() {
    trybuild::TestCases::new().compile_fail("tests/ui/*.rs");
}
