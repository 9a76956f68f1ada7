//! The services that `scripts/test.sh` starts, by the variables that it sets.

/// Returns the value of `variable`. If it is not set, the test is skipped with a message. With
/// `TEST_SERVICES=required`, as in `scripts/test.sh`, it fails instead.
pub fn service(variable: &str) -> Option<String> {
    let value = std::env::var(variable)
        .ok()
        .filter(|value| !value.is_empty());
    if value.is_none() {
        assert_ne!(
            std::env::var("TEST_SERVICES").as_deref(),
            Ok("required"),
            "{variable} is not set, but TEST_SERVICES=required"
        );
        println!("skipped: {variable} is not set; scripts/test.sh starts the service and sets it");
    }
    value
}
